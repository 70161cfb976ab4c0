"""Gateways that look for direct paths, and what is measured at them: shared by matrix, paths, lan and second_opinion.

Nothing here takes an agent's word for a path: the kernel's counters at the relays and at the NATs are the judges.
"""
import contextlib
import math
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from natlab import DOUBLE, KINDS, LabError, behaviour, kernel, wait_for
from natlab.servers import BLOCK, Service, pattern
from natlab.weft import PORT, READY, Agent, Authority, service
from report import expect

# The short form shows each thing; the full one gives distributions. CI has the short one.
SHORT = os.environ.get("WEFT_MATRIX", "short" if os.environ.get("CI") == "true" else "full") == "short"
BLOCKED = "udp-blocked"
ALL = [k for k in KINDS if k != BLOCKED] + [DOUBLE]
RELAY_SHARE = 0.05
FLOW_PORT, VIP_PORT = 7000, 80


def nat_of(kind):
    """(mapping, filtering) in RFC 4787's words."""
    return behaviour(["port-restricted"] * 2 if kind == DOUBLE else [kind])


def direct_possible(a, b):
    """The oracle: both know the other's mapping towards a relay and answer the source that they see. A packet gets in
    where its sender's mapping is the one that was told, or where the filter does not ask for the port; and where the
    port that a sender will have can be foretold, because it comes next, by one whose own is sure."""
    if BLOCKED in (a, b):
        return False

    def passes(sender, receiver):
        return nat_of(sender)[0] == "EI" or nat_of(receiver)[1] != "APD"

    def foretold(sure, sequential):
        return nat_of(sure)[0] == "EI" and sequential == "symmetric"
    return passes(a, b) and passes(b, a) or foretold(a, b) or foretold(b, a)


def words(kind):
    """How `weft peers` names a mapping."""
    if kind == "none":
        return "no NAT"
    order = " with sequential ports" if kind == "symmetric" else ""
    return f"{'endpoint-independent' if nat_of(kind)[0] == 'EI' else 'address-dependent'} mapping{order}"


class Sink:
    """Takes the pattern and says when how much of it came."""

    def __init__(self):
        self.count, self.arrivals, self.wrong, self.ended = 0, [], None, threading.Event()
        self._number, self._block = 0, next(pattern(BLOCK, 0))

    def take(self, piece):
        self.arrivals.append((time.monotonic(), len(piece)))
        while piece:
            number, at = divmod(self.count, BLOCK)
            if number != self._number:
                self._number, self._block = number, next(pattern(BLOCK, number))
            want = self._block[at:at + len(piece)]
            if piece[:len(want)] != want and self.wrong is None:
                self.wrong = self.count
            self.count += len(want)
            piece = piece[len(want):]

    def drain(self, conn):
        """Until FIN."""
        try:
            while piece := conn.recv(BLOCK):
                self.take(piece)
            self.ended.set()
        except OSError as e:
            self.wrong = self.wrong or f"{e!r} after {self.count:,} bytes"
            self.ended.set()

    def pause(self, since):
        """The longest time without a byte, after `since`."""
        times = [since, *(t for t, _ in list(self.arrivals) if t > since), time.monotonic()]
        return max(b - a for a, b in zip(times, times[1:]))

    def rate(self, span):
        """Bytes a second of the last `span` seconds."""
        now, total = time.monotonic(), 0
        for t, n in reversed(list(self.arrivals)):
            if t < now - span:
                break
            total += n
        return total / span


def pour(conn, count, stop=None):
    """Sends so much of the pattern, or all until `stop`; then FIN. How much it was."""
    sent = 0
    for block in pattern(count or 1 << 50):
        if stop and stop.is_set():
            break
        conn.sendall(block)
        sent += len(block)
    conn.shutdown(socket.SHUT_WR)
    return sent


class End:
    """One node: its agent, a Service on it, and what the internet sees of it."""

    def __init__(self, net, number, node, address, router, kind):
        self.net, self.number, self.node, self.address, self.kind = net, number, node, address, kind
        self.name, self.vip, self.router = f"edge-{number}", f"10.96.1.{number}", router
        self.agent, self.sinks, self.stops, self.poured = None, {}, {}, {}
        self.relays = None  # of its bundle; None: all
        self.server = Service(node, FLOW_PORT, self._serve)

    @property
    def public(self):
        """The source of its packets on the internet."""
        return self.node.address if self.kind == "none" else self.router.address

    def _serve(self, conn, _peer):
        """P TOKEN: takes the pattern. G TOKEN COUNT: gives so much; 0: until it is told to stop. E: sends all back."""
        head = _exactly(conn, 17)
        what, token, count = head[:1], head[1:9], struct.unpack(">Q", head[9:])[0]
        if what == b"P":
            self.sinks.setdefault(token, Sink()).drain(conn)
        elif what == b"G":
            self.poured[token] = pour(conn, count, self.stops.setdefault(token, threading.Event()))
        else:
            while piece := conn.recv(BLOCK):
                conn.sendall(piece)

    def connect(self, far, what, count=0, timeout=20.0, first=b""):
        """(socket, token) of a connection to the Service on `far`; `first` goes with the request."""
        token = os.urandom(8)
        s = self.node.tcp(far.vip, VIP_PORT, timeout=timeout)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.sendall(what + token + struct.pack(">Q", count) + first)
        return s, token

    def reaches(self, far, timeout=2.0):
        """Whether one byte comes back over a new connection."""
        with contextlib.suppress(OSError, ConnectionError):
            s, _ = self.connect(far, b"E", timeout=timeout, first=b"x")
            with s:
                return s.recv(1) == b"x"
        return False

    def direct_to(self, far):
        return self.agent.path_to(far.name) == "direct"

    def restart(self, ports=True):
        """As after a reboot that left nothing: no memory here, and (`ports`) no mapping in the NAT, but
        other public ports than before."""
        if self.agent.process and self.agent.process.alive():
            self.agent.kill()
        self.agent.forget()
        if ports and self.router and self.router.nat:
            self.router.rebind(address=False)
        self.agent.start()
        self.serving()

    def serving(self):
        wait_for(lambda: self.agent.serving(len(self.relays or self.net.at)), READY, 0.01,
                 lambda: f"{self.name} serves and is registered; its log:\n{self.agent.tail()}")


def _exactly(conn, count):
    got = b""
    while len(got) < count:
        piece = conn.recv(count - len(got))
        if not piece:
            raise ConnectionError("ended within the header")
        got += piece
    return got


class Net:
    """Two relays, since a NAT's mapping shows only by two, and ends that serve each other."""

    def __init__(self, lab, relays=2, hosts=None):
        self.lab, self.ends = lab, []
        self.hosts = hosts or [lab.host(f"relay{i}") for i in range(1, relays + 1)]
        self.authority = Authority(f"{lab.folder}/ca")
        self.relays, self.at = [], []
        for i, host in enumerate(self.hosts, 1):
            bundle = self.authority.issue(f"relay-{i}", role="relay")
            config = {"relay": {"enable": True}, "dns": {"enable": False}, "proxy": {"enable": False}}
            self.relays.append(Agent(host, f"relay-{i}", bundle, config))
            self.at.append(f"relay-{i}@{host.address}:{PORT}")

    def end(self, kind="port-restricted", name=None, site=None):
        """A gateway behind a NAT of that kind."""
        site = site or self.lab.site(name or f"s{len(self.ends) + 1}", kind, hosts=())
        return self.add(site.gateway, f"{site.lan}.1", site.router, kind)

    def add(self, node, address, router, kind):
        """Any node as an end; `address` is what its Service is reached at there."""
        end = End(self, len(self.ends) + 1, node, address, router, kind)
        self.ends.append(end)
        return end

    def start(self, edges=True, more=()):
        """Agents of the relays first; then, all at once, those of the ends. `more`: Services beside one of each end."""
        services = [service(e.name, e.vip, VIP_PORT, [(e.address, e.name)], FLOW_PORT) for e in self.ends] + list(more)
        for e in self.ends:
            config = {"dns": {"enable": False}, "service": services}
            e.agent = Agent(e.node, e.name, self.authority.issue(e.name, e.relays or self.at), config)
        for relay in self.relays:
            relay.start()
        if edges:
            each(lambda e: e.agent.start(), self.ends)
            each(End.serving, self.ends)
        return self

    def meter(self, *ends):
        """Starts the counters of all relays and, of these ends, between the NATs."""
        for host in self.hosts:
            host.meter(**{f"e{e.number}": e.public for e in self.ends})
        for e in ends:
            if e.router:
                e.router.meter(**{f"e{o.number}": o.public for o in ends if o is not e})

    def logs(self, *ends, lines=12):
        return " | ".join(f"{e.name} ({e.kind}): {e.agent.tail(lines)}" for e in ends)


def by_tcp(agent, relays=1):
    """Whether it says that it talks to so many relays by TCP."""
    status = agent.tell("status") or {}
    return sum(r["registered"] and "by TCP" in r["note"] for r in status.get("relays", [])) == relays


class Meter:
    """Bytes of TCP and of UDP that a relay has got from and given to a site's router."""

    def __init__(self, host, **remotes):
        self.host, rules, counters = host, {"i": [], "o": []}, ""
        for label, address in remotes.items():
            for proto in ("tcp", "udp"):
                for way, field in (("i", "saddr"), ("o", "daddr")):
                    name = f"{proto}_{way}_{label}"
                    counters += f" counter {name} {{ }}\n"
                    rules[way].append(f"ip {field} {address} meta l4proto {proto} counter name {name}")
        kernel.nft(host.ns, "table ip both\ndelete table ip both\ntable ip both {\n" + counters
                   + " chain i { type filter hook prerouting priority raw;\n" + "\n".join(rules["i"]) + "\n }\n"
                   + " chain o { type filter hook postrouting priority srcnat + 90;\n" + "\n".join(rules["o"]) + "\n }\n}\n")

    def read(self):
        found = kernel.nft_json(self.host.ns, "list", "counters", "table", "ip", "both")
        return {c["counter"]["name"]: c["counter"]["bytes"] for c in found if "counter" in c}


class Tally:
    """Bytes of UDP since it was made: by the relays, and from NAT to NAT."""

    def __init__(self, net, a, b):
        self.net, self.a, self.b = net, a, b
        self.before = self._read()

    def _read(self):
        a, b = f"e{self.a.number}", f"e{self.b.number}"
        relays = [host.metered() for host in self.net.hosts]
        at_a, at_b = self.a.router.metered(), self.b.router.metered()

        def by_relay(sender, receiver):
            # What one sends and what the other gets: a datagram lost on its way counts too.
            return sum(max(r[f"in_{sender}"][1], 0) for r in relays), sum(r[f"out_{receiver}"][1] for r in relays)
        return {"relay a>b": by_relay(a, b), "relay b>a": by_relay(b, a),
                "direct a>b": (at_a[f"out_{b}"][1], at_b[f"in_{a}"][1]),
                "direct b>a": (at_b[f"out_{a}"][1], at_a[f"in_{b}"][1])}

    def read(self):
        """{"relay a>b": (left the sender, came to the receiver), …}"""
        now = self._read()
        return {k: tuple(n - o for n, o in zip(now[k], self.before[k])) for k in now}


def each(work, things, at_once=16):
    """Does it for all of them at the same time; raises the first failure after all have ended."""
    with ThreadPoolExecutor(min(at_once, max(1, len(things)))) as pool:
        return [f.result() for f in [pool.submit(work, t) for t in things]]


def download(near, far, count, patience=60.0):
    """So much of the pattern from far to near over one connection."""
    s, _ = near.connect(far, b"G", count, timeout=patience)
    sink = Sink()
    with s:
        sink.drain(s)
    expect(sink.count == count and sink.wrong is None, f"{sink.count:,} of {count:,} bytes; wrong: {sink.wrong}")


def upload(near, far, count, patience=60.0):
    s, token = near.connect(far, b"P", timeout=patience)
    with s:
        pour(s, count)
        expect(s.recv(1) == b"", "bytes from a sink")
    sink = far.sinks.pop(token)
    expect(sink.count == count and sink.wrong is None, f"{sink.count:,} of {count:,} bytes; wrong: {sink.wrong}")


class Flow:
    """A transfer that goes on until `end`: to the near end, or from it."""

    def __init__(self, near, far, down):
        self.near, self.far, self.down = near, far, down
        self.socket, self.token = near.connect(far, b"G" if down else b"P", timeout=60)
        if down:
            self.sink, self.stop = Sink(), far.stops.setdefault(self.token, threading.Event())
            work = lambda: self.sink.drain(self.socket)
        else:
            self.sink, self.stop = far.sinks.setdefault(self.token, Sink()), threading.Event()
            work = self._pour
        threading.Thread(target=work, daemon=True).start()

    def _pour(self):
        with contextlib.suppress(OSError):
            self.near.poured[self.token] = pour(self.socket, 0, self.stop)

    def more(self, count, patience=20.0):
        """Waits until so many more bytes have come."""
        want = self.sink.count + count
        wait_for(lambda: self.sink.count >= want or self.sink.ended.is_set(), patience, 0.01,
                 lambda: f"{count:,} more bytes; {self.sink.count - want + count:,} came")

    def end(self, patience=30.0):
        """Every byte that was sent has come, in order, and then FIN."""
        self.stop.set()
        expect(self.sink.ended.wait(patience), f"no FIN within {patience:g} s after {self.sink.count:,} bytes")
        self.close()
        sent = (self.far if self.down else self.near).poured.get(self.token)
        expect(self.sink.wrong is None and self.sink.count == sent, f"{self.sink.count:,} of {sent} bytes; wrong: {self.sink.wrong}")

    def close(self):
        self.stop.set()
        self.socket.close()


def until_direct(a, b, patience, every=0.01):
    """Seconds until both say that they are direct; None where they do not."""
    begin = time.monotonic()
    while time.monotonic() < begin + patience:
        if a.direct_to(b) and b.direct_to(a):
            return time.monotonic() - begin
        time.sleep(every)
    return None


def spread(seconds):
    """The distribution in a line, in ms."""
    ordered = sorted(s * 1000 for s in seconds)
    at = {f"p{p}": percentile(ordered, p) for p in (50, 95, 99)}
    said = ", ".join(f"{k} {v:.0f}" for k, v in at.items())
    return f"n={len(ordered)}: min {ordered[0]:.0f}, {said}, max {ordered[-1]:.0f} ms"


def percentile(ordered, p):
    """Nearest rank."""
    return ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)]


__all__ = ["ALL", "BLOCKED", "Flow", "LabError", "Meter", "Net", "RELAY_SHARE", "SHORT", "Sink", "Tally", "by_tcp", "direct_possible",
           "download", "each", "expect", "percentile", "pour", "spread", "until_direct", "upload", "wait_for", "words"]
