"""Commands, namespaces and sockets inside them: what the lab asks of the kernel, and nothing about networks."""
import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import time

CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The lab itself could not do what it was asked; never a verdict on the product."""


def run(argv, stdin=None, check=True, timeout=60):
    """Runs a command to its end and returns its output. `check=False` lets it fail."""
    try:
        done = subprocess.run(argv, input=stdin, text=True, capture_output=True, timeout=timeout)
    except FileNotFoundError as e:
        raise LabError(f"{argv[0]} is not installed") from e
    if check and done.returncode:
        what = " ".join(argv) + (f"\n{stdin[:2000]}" if stdin else "")
        raise LabError(f"{what}\nfailed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def inside(namespace):
    """The calling thread, and only it, is in that network namespace: a socket made here stays there."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(here)
    finally:
        os.close(here)


def _setns(fd):
    if _libc.setns(fd, CLONE_NEWNET):
        err = ctypes.get_errno()
        raise LabError(f"setns: {os.strerror(err)} (root is needed)")


def sysctl(namespace, values):
    """`{"net/ipv4/ip_forward": 1}`; keys that this kernel lacks are left out."""
    with inside(namespace):
        for key, value in values.items():
            with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/{key}", "w", encoding="ascii") as f:
                f.write(str(value))


def ip(namespace, *lines):
    """Lines of `ip -batch` in one process."""
    run(["ip", "-n", namespace, "-batch", "-"], "\n".join(lines) + "\n")


def nft(namespace, text):
    """One atomic nftables transaction."""
    run(["ip", "netns", "exec", namespace, "nft", "-f", "-"], text)


def nft_json(namespace, *args):
    return json.loads(run(["ip", "netns", "exec", namespace, "nft", "-j", *args]))["nftables"]


def ip_json(namespace, *args):
    return json.loads(run(["ip", "-n", namespace, "-j", *args]) or "[]")


def family_of(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def udp(namespace, address="0.0.0.0", port=0, timeout=1.0):
    """At "::" for both families."""
    with inside(namespace):
        s = socket.socket(family_of(address), socket.SOCK_DGRAM)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        s.bind((address, port))
        s.settimeout(timeout)
        return s


def tcp_listener(namespace, address="0.0.0.0", port=0, backlog=1024):
    with inside(namespace):
        s = socket.socket(family_of(address))
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((address, port))
        s.listen(backlog)
        return s


def tcp(namespace, address, port, timeout=10.0, source=None):
    """Connects from inside the namespace; names are never looked up here."""
    with inside(namespace):
        s = socket.socket(family_of(address))
        try:
            s.settimeout(timeout)
            if source:
                s.bind((source, 0))
            s.connect((address, port))
        except BaseException:
            s.close()
            raise
        return s


def flush_conntrack(namespace):
    """Forgets every connection: ctnetlink's CT_DELETE without a tuple (linux/netfilter/nfnetlink_conntrack.h)."""
    nlm_request_ack, ctnetlink_delete, netlink_netfilter = 0x1 | 0x4, 1 << 8 | 2, 12
    body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    message = struct.pack("=IHHII", 16 + len(body), ctnetlink_delete, nlm_request_ack, 1, 0) + body
    with inside(namespace):
        s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink_netfilter)
    with s:
        s.settimeout(5)
        s.send(message)
        error = struct.unpack_from("=i", s.recv(4096), 16)[0]
    if error:
        raise LabError(f"flush of conntrack in {namespace}: {os.strerror(-error)}")


def started_at(pid):
    """The kernel's start time of a process; None where there is none. Guards against a pid that was used again."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
            fields = f.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def end_process(pid, start, patience=3.0):
    """SIGTERM, then SIGKILL after `patience`; does nothing if that process is gone already."""
    for signum, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        if started_at(pid) != start:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
        until = time.monotonic() + wait
        while time.monotonic() < until:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if started_at(pid) != start:
                return
            time.sleep(0.01)


def _status_bytes(pid, *rows):
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
        all_rows = dict(line.split(":", 1) for line in f if ":" in line)
    return tuple(int(all_rows[row].split()[0]) * 1024 for row in rows)


def rss_bytes(pid):
    """Resident memory, and its peak, of a process."""
    return _status_bytes(pid, "VmRSS", "VmHWM")


def held_bytes(pid):
    """Resident memory of a process: what is its own, and what is of files."""
    return _status_bytes(pid, "RssAnon", "RssFile")
