"""F: labels, families, hygiene."""
from natlab import wait_for
from report import expect
from stage import refused

from .world import eq, ports, seen


def rows_f(w, case):
    def label(n, key, value):
        ip = f"10.96.1.{n}"
        eq(w.tries(w.ask, ip, timeout=1), None)
        w.kube.service(f"r{n}", ip, ports("80/TCP:8080"), [w.a])
        w.kube.write()
        wait_for(lambda: w.tries(w.ask, ip, timeout=1) == "a", 10, what="without the label it serves")
        w.kube.service(f"r{n}", ip, ports("80/TCP:8080"), [w.a], labels={key: value})
        w.kube.write()
        wait_for(lambda: w.tries(w.ask, ip, timeout=1) is None, 10, what="with it it does not")
    case(78, "service-proxy-name", lambda: label(78, "service.kubernetes.io/service-proxy-name", "other"))

    def loop():
        before = w.agent.counters()["proxy_accepted"]
        eq(w.tries(w.ask, "10.96.1.79", timeout=2), None)
        more = w.agent.counters()["proxy_accepted"] - before
        expect(more < 10, f"{more} connections of its own")
    case(79, "own-connections-are-not-caught", loop)
    case(80, "headless-label", lambda: label(80, "service.kubernetes.io/headless", ""))
    case(81, "edgemesh-label", lambda: label(81, "service.edgemesh.kubeedge.io/service-proxy-name", ""))
    case(84, "fqdn-slices", lambda: eq(set(seen(w, "10.96.1.84", 6)), {"a"}))
    case(85, "slices-of-another-family", lambda: eq(set(seen(w, "10.96.1.84", 6)), {"a"}))
    case(86, "bad-addresses", lambda: eq(set(seen(w, "10.96.1.86", 6)), {"a"}))
    case(87, "a-port-without-number", lambda: eq((set(seen(w, "10.96.1.87", 6)), refused(w.one.client, "10.96.2.87") < 1), ({"a"}, True)))
    case(96, "another-service-range", lambda: eq(w.ask("172.30.0.96"), "a"))

    def drop():
        gateway, tool = w.one.gateway, "iptables-nft" if w.backend == "nft" else w.backend
        gateway.run(tool, "-P", "INPUT", "DROP")
        gateway.run(tool, "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
        gateway.run(tool, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
        try:
            wait_for(lambda: w.tries(w.ask, "10.96.2.9", timeout=1) == "a", 35, what="it works with a closed INPUT")
            eq(w.tries(w.datagram, "10.96.1.25"), b"a:ping")
            uplink, outside = gateway.address, w.outside()
            eq((w.ask(uplink, 30063, outside), w.datagram(uplink, 30063, outside)), ("a", b"a:ping"))
            eq(w.tries(w.ask, uplink, 30064, outside, timeout=1), None)
        finally:
            gateway.run(tool, "-P", "INPUT", "ACCEPT")
            gateway.run(tool, "-F", "INPUT")
    case(97, "input-drop", drop)

    def clean():
        code = w.agent.stop()
        left = w.one.gateway.run("sh", "-c", f"nft list ruleset; {w.backend if w.backend != 'nft' else 'iptables-nft'}-save;"
                                     f"ip6tables-{'legacy' if 'legacy' in w.backend else 'nft'}-save; ip addr; ip route; ip -6 route")
        eq((code, "weft" in left.lower()), (0, False))
    case(94, "nothing-left", clean)
