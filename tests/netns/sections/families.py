"""IPv6: the rows where it makes sense, by their numbers."""
from natlab import kernel, wait_for
from report import expect
from stage import refused

from .datagrams import Sender
from .world import eq, ports, seen

DUAL, DUAL_OF_FOUR, SIX, FAR = "fd00:96::1:82", "fd00:96::2:82", "fd00:96::1:83", "fd00:96::2:83"


def rows_6(w, case):
    one, everyone = w.one, w.clients().values()
    tool = "ip6tables-legacy" if w.backend == "iptables-legacy" else "ip6tables-nft"

    def dual():
        for node in everyone:
            eq((set(seen(w, "10.96.1.82", 4, node)), set(seen(w, DUAL, 4, node))), ({"a"}, {"b"}))
            eq((w.datagram("10.96.1.82", node=node), w.datagram(DUAL, node=node)), (b"a:ping", b"b:ping"))
        return "TCP and UDP from pod, node, backend"
    case(82, "dual-stack", dual)

    def one_family():
        """The other one has no endpoint: refused, and not brought to endpoints of another family."""
        eq(w.ask("10.96.2.82"), "a")
        for node in everyone:
            refused(node, DUAL_OF_FOUR)
            expect(w.refused_udp(DUAL_OF_FOUR, 53, node), "UDP is not refused")
        refused(one.client, "10.96.2.83")
    case(82, "dual-stack.endpoints-of-one-family", one_family)

    def alone():
        for node in everyone:
            eq(set(seen(w, SIX, 8, node)), {"a", "b"})
            got = {w.datagram(SIX, node=node) for _ in range(8)}
            expect(got and got <= {b"a:ping", b"b:ping"}, got)
    case(83, "ipv6-only", alone)
    case(83, "ipv6-only.far", lambda: eq((w.ask(FAR), w.datagram(FAR, timeout=8)), ("far", b"far:ping")))
    case(10, "node-port.ipv6", lambda: [
        eq((w.ask(w.six[one.gateway.name], 30083, node) in "ab", w.datagram(w.six[one.gateway.name], 30082, node)), (True, b"b:ping"))
        for node in everyone] and None)
    case(42, "unknown-port.ipv6", lambda: refused(one.client, SIX, 9999))

    def large():
        for size in (8_192, 60_000):
            data = bytes(i * 7 % 251 for i in range(size))
            eq(w.datagram(SIX, data=data)[1:] == b":" + data, True)
    case(25, "large.ipv6", large)

    def replaced():
        dns = ports("53/UDP:5300")
        def changed(endpoint):
            w.kube.service("r52six", "fd00:96::1:52", dns, slices=[])
            w.kube.slice("r52six", "r52six-6", dns, [endpoint], family="IPv6")
            w.kube.write()
        changed(w.a6)
        return Sender(one.client, "fd00:96::1:52").moves(lambda: changed(w.b6))
    case(52, "replaced-while-sending.ipv6", replaced)

    def drop():
        gateway = one.gateway
        gateway.run(tool, "-P", "INPUT", "DROP")
        gateway.run(tool, "-A", "INPUT", "-p", "ipv6-icmp", "-j", "ACCEPT")
        gateway.run(tool, "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
        gateway.run(tool, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
        try:
            wait_for(lambda: w.tries(w.ask, SIX, timeout=1), 35, what="it works with a closed INPUT")
            expect(w.tries(w.datagram, SIX) in (b"a:ping", b"b:ping"), "UDP")
        finally:
            gateway.run(tool, "-P", "INPUT", "ACCEPT")
            gateway.run(tool, "-F", "INPUT")
    case(97, "input-drop.ipv6", drop)

    def flushed():
        if w.backend == "nft":
            one.gateway.run("nft", "delete", "table", "ip6", "weft")
        else:
            one.gateway.run(tool, "-t", "nat", "-F")
        wait_for(lambda: w.tries(w.ask, SIX, timeout=1), 15, what="rules are put back")
    case("39a", "flushed.ipv6", flushed)

    def off():
        """A host that has switched IPv6 off serves IPv4, and says what it does not do; on again, it does that too."""
        gateway = one.gateway
        set_off = lambda value: kernel.sysctl(gateway.ns, {f"net/ipv6/conf/{of}/disable_ipv6": value for of in ("all", "default")})
        w.agent.stop()
        set_off(1)
        try:
            w.agent.start()
            wait_for(lambda: w.tries(w.ask, "10.96.1.82", timeout=1) == "a", 10, what="IPv4 works")
            eq(w.datagram("10.96.1.82"), b"a:ping")
            wait_for(lambda: "no IPv6 here" in w.agent.say("status"), 5, what=lambda: f"it is said; {w.agent.say('status')}")
        finally:
            set_off(0)
            gateway.ip(f"addr add {w.six[gateway.name]}/64 dev lan")
        wait_for(lambda: w.tries(w.ask, DUAL, timeout=1) == "b", 45, what=lambda: f"IPv6 works again; {w.agent.tail()}")
    case(85, "ipv6-switched-off", off)
