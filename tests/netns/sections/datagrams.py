"""D: the state of UDP."""
import contextlib
import threading
import time

from natlab import wait_for
from report import expect

from .world import ports


class Sender:
    """From one port, each 100 ms, as a game or a phone does; `last` is the newest answer."""

    def __init__(self, node, address, port=53):
        self.s = node.udp("::" if ":" in address else "0.0.0.0", timeout=0.1)
        self.last, self.at, self.over = b"", 0.0, False
        self.s.connect((address, port))
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while not self.over:
            with contextlib.suppress(OSError):
                self.s.send(b"tick")
            with contextlib.suppress(OSError):
                self.last, self.at = self.s.recv(100), time.monotonic()
            time.sleep(0.05)
        self.s.close()

    def hears(self, want, within, what):
        begin = time.monotonic()
        wait_for(lambda: self.last == want and self.at > begin, within, 0.05, what=what)
        return f"{time.monotonic() - begin:.1f} s"

    def moves(self, change):
        """It goes on while its backend is replaced; and then no more."""
        try:
            self.hears(b"a:tick", 10, "the first backend")
            change()
            return self.hears(b"b:tick", 5, "the new backend")
        finally:
            self.over = True


def rows_d(w, case):
    dns = ports("53/UDP:5300")

    def changed(endpoints, of=dns, name="r52", ip="10.96.1.52"):
        w.kube.service(name, ip, of, endpoints)
        w.kube.write()

    def replaced():
        changed([w.a])
        return Sender(w.one.client, "10.96.1.52").moves(lambda: changed([w.b]))
    case(52, "replaced-while-sending", replaced)

    def by_node_port():
        def opened(endpoint):
            w.kube.service("r53", "10.96.1.53", ports("53/UDP:5300:u:30053"), [endpoint], type="NodePort")
            w.kube.write()
        opened(w.a)
        return Sender(w.outside(), w.one.gateway.address, 30053).moves(lambda: opened(w.b))
    case(53, "replaced-while-sending.node-port", by_node_port)

    def by_internal_policy():
        def local(endpoint):
            w.kube.service("r54", "10.96.1.54", dns, [endpoint], internalTrafficPolicy="Local")
            w.kube.write()
        local(w.a)
        return Sender(w.one.client, "10.96.1.54").moves(lambda: local(w.b))
    case(54, "replaced-while-sending.internal-policy-local", by_internal_policy)

    def first_none():
        changed([], name="r55", ip="10.96.1.55")
        sender = Sender(w.one.client, "10.96.1.55")
        try:
            time.sleep(2)
            changed([w.a], name="r55", ip="10.96.1.55")
            took = sender.hears(b"a:tick", 5, "the backend")
        finally:
            sender.over = True
        return took
    case(55, "first-no-endpoint", first_none)

    def target():
        changed([w.a])
        sender = Sender(w.one.client, "10.96.1.52")
        try:
            sender.hears(b"a:tick", 10, "the first port")
            changed([w.a], ports("53/UDP:5400"))
            took = sender.hears(b"a4:tick", 5, "the new port")
        finally:
            sender.over = True
        return took
    case(56, "target-port-changes", target)

    def older_than_us():
        """Started before weft, and through a kill -9."""
        sender = Sender(w.one.client, "10.96.1.4")
        node = Sender(w.one.gateway, "10.96.1.4")
        try:
            node.s.settimeout(0.1)
            w.agent.stop()
            time.sleep(1)
            w.agent.start()
            begin = time.monotonic()
            for s in (sender, node):
                wait_for(lambda s=s: s.at > begin, 3, 0.05, what="answered after weft's start")
            first = time.monotonic() - begin
            w.agent.kill()
            time.sleep(1)
            w.agent.start()
            begin = time.monotonic()
            for s in (sender, node):
                wait_for(lambda s=s: s.at > begin, 3, 0.05, what="answered after a kill and a restart")
            return f"{first:.1f} s, {time.monotonic() - begin:.1f} s"
        finally:
            sender.over = node.over = True
    case(57, "clients-older-than-the-agent", older_than_us)

    def many():
        before = w.agent.counters()["proxy_udp_sessions"]
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(w.one.client.udp(timeout=0.2)) for _ in range(6_000)]
            for i, s in enumerate(socks):
                s.connect(("10.96.1.4", 53))
                with contextlib.suppress(OSError):
                    s.send(b"x")
                if i % 250 == 249:
                    # No faster than they are taken: what a full socket drops shows nothing.
                    with contextlib.suppress(TimeoutError):
                        wait_for(lambda: w.agent.counters()["proxy_udp_sessions"] - before > i, 3)
            # What waits before it may fill the socket.
            wait_for(lambda: w.tries(w.datagram, "10.96.1.4", timeout=1) in (b"a:ping", b"b:ping"), 5, what="UDP goes on")
            expect(w.ask("10.96.1.1") in "ab", "TCP")
        opened = w.agent.counters()["proxy_udp_sessions"] - before
        expect(opened > 4_200, f"only {opened} sessions: this shows nothing")
        return f"{opened} sessions, of which 4,096 at most at once; UDP and TCP go on"
    case(59, "many-clients", many)

    # Looked at again at the end: it is silent meanwhile.
    w.idle = w.one.client.udp(timeout=3.0)
    w.tries(w.datagram, "10.96.1.25", s=w.idle)
    w.idle_since, w.idle_seen = time.monotonic(), set(w.udp[0].seen)
