"""E: source address, affinity, policies, topology."""
import time

from natlab import wait_for
from report import expect
from stage import read_all

from .world import eq, ports, seen


def rows_e(w, case):
    uplink, outside = w.one.gateway.address, w.outside()
    def who_is_seen(address, port, node):
        """A limit that the README names: a server sees this node, and not its client."""
        with node.tcp(address, port, timeout=3) as s:
            seen_as = read_all(s).decode().split()[1]
        expect(seen_as.removeprefix("::ffff:") == f"{w.one.lan}.1" != node.address, f"seen as {seen_as}")
        return seen_as
    case(60, "a-server-sees-this-node", lambda: who_is_seen("10.96.1.1", 80, w.one.client))
    case(63, "a-server-sees-this-node.external-policy-local", lambda: who_is_seen(uplink, 30063, outside))
    case(61, "external-traffic-policy-cluster", lambda: eq({w.ask(uplink, 30010, outside) for _ in range(8)}, {"a", "b"}))

    def nobody_here():
        """Not even a refusal for who comes from elsewhere; the host itself is served as ever."""
        try:
            w.ask(uplink, 30062, outside, timeout=1.5)
            eq("answered", "silence")
        except TimeoutError:
            pass
        eq(w.tries(w.datagram, uplink, 30062, outside, timeout=1.5), None)
        eq(w.refused_udp(uplink, 30062, outside), False)
        eq((w.ask(uplink, 30062, w.one.gateway), w.datagram(uplink, 30062, w.one.gateway, timeout=8)), ("far", b"far:ping"))
        eq((w.ask(uplink, 30063, outside), w.datagram(uplink, 30063, outside)), ("a", b"a:ping"))
    case(62, "external-traffic-policy-local", nobody_here)

    def local_only():
        eq(w.tries(w.ask, "10.96.1.64", timeout=1.5), None)
        eq(set(seen(w, "10.96.2.64", 6)), {"b"})
    case(64, "internal-traffic-policy-local", local_only)
    case(65, "internal-traffic-policy-local.host", lambda: eq(w.tries(w.ask, "10.96.1.64", node=w.one.gateway, timeout=1.5), None))
    case(66, "affinity", lambda: eq([len(set(seen(w, "10.96.1.66", node=n))) for n in w.clients().values()], [1, 1, 1]))

    def timeout():
        first = w.ask("10.96.1.67")
        for _ in range(3):
            time.sleep(2)
            eq(w.ask("10.96.1.67"), first)  # counted from the last use
        moved = False
        for _ in range(3):
            time.sleep(4.5)
            moved |= w.ask("10.96.1.67") != first
        expect(moved, "it never moved")
    case(67, "affinity-timeout", timeout)

    def switched():
        w.kube.service("r68", "10.96.1.68", ports("80/TCP:8080"), [w.a, w.b])
        w.kube.write()
        wait_for(lambda: w.tries(w.ask, "10.96.1.68", timeout=1), 10, what="it serves")
        eq(set(seen(w, "10.96.1.68")), {"a", "b"})
        w.kube.service("r68", "10.96.1.68", ports("80/TCP:8080"), [w.a, w.b], sessionAffinity="ClientIP")
        w.kube.write()
        wait_for(lambda: len(set(seen(w, "10.96.1.68"))) == 1, 10, what="it sticks")
        stuck = w.ask("10.96.1.68")
        # 69: the one that it sticks to goes.
        w.kube.service("r68", "10.96.1.68", ports("80/TCP:8080"), [w.b if stuck == "a" else w.a], sessionAffinity="ClientIP")
        w.kube.write()
        wait_for(lambda: w.ask("10.96.1.68") != stuck, 10, what="it moves")
        w.kube.service("r68", "10.96.1.68", ports("80/TCP:8080"), [w.a, w.b])
        w.kube.write()
        wait_for(lambda: len(set(seen(w, "10.96.1.68"))) == 2, 10, what="it sticks no longer")
    case(68, "affinity-switched", switched)
    case(69, "affinity-and-a-removed-endpoint", lambda: "in the case before")

    def by_node_port():
        w.kube.service("r71", "10.96.1.71", ports("80/TCP:8080:t:30071"), [w.a, w.b], type="NodePort", sessionAffinity="ClientIP")
        w.kube.write()
        wait_for(lambda: w.tries(w.ask, uplink, 30071, outside, timeout=1), 10, what="it serves")
        eq(len({w.ask(uplink, 30071, outside) for _ in range(20)}), 1)
        return "20 of 20"
    case(71, "affinity.node-port", by_node_port)
    case(72, "affinity-udp", lambda: eq(len({w.datagram("10.96.1.66") for _ in range(8)}), 1))

    def even():
        got = seen(w, "10.96.1.1", 200)
        eq((got.count("a"), got.count("b")), (100, 100))
    case(76, "even", even)
    case(77, "without-node", lambda: eq(w.ask("10.96.1.77"), "a"))
