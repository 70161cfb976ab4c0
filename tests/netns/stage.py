"""What the end-to-end themes share: a cluster with servers, and checks of what a gateway's kernel holds."""
import contextlib
import hashlib
import os
import re
import selectors
import socket
import sys
import time

from natlab import Lab, LabError, kernel, servers, wait_for, weft
from natlab.weft import ADDRESS, Cluster, service
from report import Report, Skip, expect

WEB, FAR, LOCAL, NONE, BOTH, STICKY, LAME, FAR_LAME, ECHO = (f"10.96.0.{n}" for n in range(10, 19))


class Stage:
    """Two sites. Site 2 serves most; site 1 asks. `close` ends the servers; the lab ends the rest."""

    def __init__(self, lab, start=True, nats=("port-restricted", "port-restricted"), lan=None, **tables):
        self.lab, self.cluster = lab, Cluster(lab, nats, lan=lan)
        one, two = self.one, self.two = self.cluster.sites.values()
        dns = self.cluster.dns_host
        servers.dns(dns.udp(port=53), dns.listen(53), self.cluster.zone)
        for i, site in enumerate((one, two), 1):
            servers.web(site.web.listen(8080), f"site {i}")
        self.far = servers.Service(two.web, 7000, servers.echo_at_end)
        self.echo = servers.Service(two.web, 7001, servers.echo)
        self.first = servers.Service(two.web, 7002, servers.says("first"))
        self.second = servers.Service(two.client, 7002, servers.says("second"))
        self.near = servers.Service(one.web, 7003, servers.says("near"))
        self.services = [
            service("web", WEB, 80, [(two.web.address, "edge-2")], 8080),
            service("far", FAR, 7000, [(two.web.address, "edge-2")]),
            service("local", LOCAL, 80, [(one.web.address, "edge-1")], 8080),
            service("none", NONE, 80, []),
            service("both", BOTH, 80, [(two.web.address, "edge-2"), (two.client.address, "edge-2")], 7002),
            service("sticky", STICKY, 80, [(two.web.address, "edge-2"), (two.client.address, "edge-2")], 7002, sticky=600),
            # Nobody listens on the client's port 7003 at site 1, nor on its port 7001 at site 2.
            service("lame", LAME, 80, [(one.client.address, "edge-1"), (one.web.address, "edge-1")], 7003),
            service("far-lame", FAR_LAME, 80, [(two.client.address, "edge-2"), (two.web.address, "edge-2")], 7001),
            service("echo", ECHO, 7001, [(two.web.address, "edge-2")]),
        ]
        for site in (one, two):
            for node in (site.gateway, site.client):
                node.resolver(ADDRESS)
        self.relay = self.cluster.relay()
        self.edge1 = self.cluster.edge("edge-1", files=self.services, **tables)
        self.edge2 = self.cluster.edge("edge-2", services=self.services, **tables)
        if start:
            self.cluster.start()

    def rewrite(self, services):
        """Puts another list of Services on edge-1's disk."""
        weft.write(self.edge1.config["kube"]["manifests"][0], weft.manifests(services))

    def logs(self, lines=12):
        return " | ".join(f"{a.name}: {a.tail(lines)}" for a in self.cluster.agents.values())


def works(stage, timeout=2.0):
    """Whether a new connection from site 1's LAN reaches site 2."""
    with contextlib.suppress(OSError):
        with stage.one.client.tcp(WEB, 80, timeout=timeout) as s:
            s.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return b"site 2" in read_all(s)
    return False


def curl(node, url, *options, timeout=20):
    return node.run("curl", "-sS", "--fail", "--max-time", str(timeout), *options, url, timeout=timeout + 10)


def read_all(s):
    """Until the far end's FIN."""
    pieces = []
    while piece := s.recv(1 << 18):
        pieces.append(piece)
    return b"".join(pieces)


def fetch_sha256(node, address, count, port=80):
    """Downloads /bytes/COUNT and gives its SHA-256 and the seconds it took."""
    begin, digest, got = time.monotonic(), hashlib.sha256(), 0
    with node.tcp(address, port) as s:
        s.settimeout(60)
        s.sendall(f"GET /bytes/{count} HTTP/1.0\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            piece = s.recv(4096)
            expect(piece, f"the connection ended within the header: {head!r}")
            head += piece
        expect(head.split(b"\r\n")[0].endswith(b"200 OK"), head[:200])
        body = head.split(b"\r\n\r\n", 1)[1]
        room = memoryview(bytearray(1 << 18))
        while True:
            digest.update(body)
            got += len(body)
            n = s.recv_into(room)
            if not n:
                break
            body = room[:n]
    expect(got == count, f"{got} of {count} bytes")
    return digest.hexdigest(), time.monotonic() - begin


def refused(node, address, port=80, within=1.0):
    """Seconds until the connection was refused; anything else is a failure."""
    begin = time.monotonic()
    try:
        node.tcp(address, port, timeout=5).close()
    except ConnectionRefusedError:
        took = time.monotonic() - begin
        expect(took < within, f"refused only after {took:.2f} s")
        return took
    except OSError as e:
        raise AssertionError(f"{address}:{port}: {e!r} after {time.monotonic() - begin:.2f} s, wanted: refused") from e
    raise AssertionError(f"{address}:{port}: the connection was made")


def kernel_state(node):
    """Rules, chains, devices, addresses and routes of a namespace; what tables an iptables leaves empty is left out."""
    state = {}
    for tool in ("iptables-save", "ip6tables-save"):
        with contextlib.suppress(LabError):
            tables = {}
            for line in node.run(tool, check=False).splitlines():
                if line.startswith("*"):
                    rules = tables.setdefault(line[1:], [])
                elif line.startswith("-") or (line.startswith(":") and " ACCEPT " not in line):
                    rules.append(re.sub(r" *\[\d+:\d+\]", "", line))
            # iptables-save shows the tables in the order in which they were made: that is no difference.
            state[tool] = [f"{table} {rule}" for table in sorted(tables) for rule in tables[table]]
    # Those of iptables-nft have just been looked at.
    ruleset = kernel.run(["ip", "netns", "exec", node.ns, "nft", "-s", "list", "ruleset"]).splitlines()
    ours = kernel.run(["ip", "netns", "exec", node.ns, "sh", "-c", "nft -s list table ip weft 2>/dev/null || true"]).splitlines()
    state["nft"] = sorted(ours + [line for line in ruleset if "weft:" in line])
    for what in ("link", "addr", "rule"):
        text = kernel.run(["ip", "-n", node.ns, "-o", what])
        state[what] = sorted(re.sub(r"(valid|preferred)_lft \S+|qlen \d+", "", line) for line in text.splitlines())
    for family in ("-4", "-6"):
        state[f"route {family}"] = sorted(kernel.run(["ip", family, "-n", node.ns, "route", "show", "table", "all"]).splitlines())
    return state


def difference(before, after):
    """What is there that was not, and what was there and is not."""
    out = []
    for what in before:
        was, now = before[what], after.get(what, [])
        out += [f"{what}: new: {line}" for line in now if line not in was]
        out += [f"{what}: gone: {line}" for line in was if line not in now]
    return out


def many(node, address, port, count, payload, patience=60.0):
    """`count` connections opened without waiting for each other; each sends `payload`, all stay open until every one has
    it back. The number that did."""
    waiting, whole, socks = {}, 0, []
    selector = selectors.DefaultSelector()
    with kernel.inside(node.ns):
        for _ in range(count):
            s = socket.socket()
            s.setblocking(False)
            s.connect_ex((address, port))
            socks.append(s)
    try:
        for s in socks:
            waiting[s] = [0, 0]  # sent, received
            selector.register(s, selectors.EVENT_READ | selectors.EVENT_WRITE)
        until, failed = time.monotonic() + patience, 0
        while whole + failed < count and time.monotonic() < until:
            for key, events in selector.select(1.0):
                s, state = key.fileobj, waiting[key.fileobj]
                try:
                    if events & selectors.EVENT_WRITE:
                        state[0] += s.send(payload[state[0]:])
                        if state[0] == len(payload):
                            selector.modify(s, selectors.EVENT_READ)
                    if events & selectors.EVENT_READ:
                        data = s.recv(65536)
                        if payload[state[1]:state[1] + len(data)] != data or not data:
                            raise ConnectionError("ended, or other bytes")
                        state[1] += len(data)
                        if state[1] == len(payload):
                            whole += 1
                            selector.unregister(s)
                except BlockingIOError:
                    continue
                except OSError:
                    failed += 1
                    selector.unregister(s)
        return whole
    finally:
        selector.close()
        for s in socks:
            s.close()


def limit_files(count=4096):
    """Room for many sockets in this process."""
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard) if hard > 0 else count, hard))


def main(theme):
    """Runs a theme, `theme(lab, report)`, in a lab of its own. What stops it as a whole is a failure too."""
    report = Report(os.path.basename(sys.argv[0]))
    try:
        with Lab() as lab:
            theme(lab, report)
    except Exception as e:  # noqa: BLE001: said, and counted
        report.line("FAIL", "stage", f"{type(e).__name__}: {e}")
    sys.exit(report.end())


__all__ = ["Skip", "Stage", "curl", "difference", "expect", "fetch_sha256", "kernel_state", "limit_files", "main", "many",
           "read_all", "refused", "wait_for", "works"]
