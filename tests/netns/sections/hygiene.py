"""F: labels, families, hygiene."""
import time

from natlab import servers, wait_for
from natlab.weft import Agent
from report import expect
from stage import refused

from .apart import Crowd, Healthy, Hindrance, LateApi, end_api
from .world import eq, ports, seen

# src/proxy/udp.rs: an answered session, and how often they are looked for; and something for the look itself.
IDLE, SWEEP = 120, 5 + 2
# src/rules.rs: the most that a failed sync is put off at first.
RETRY = 20


def rows_f(w, case):
    def health():
        w.health = Healthy(w)
        return w.health.begin()
    case(89, "well-and-alive", health)

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

    def nobody_is_refused_at_first():
        """Of a list that is not whole no rule says that a Service has no endpoint."""
        host = w.lab.host("late")
        served = servers.Service(host, 8080, servers.says("late"))
        api = LateApi.serve(host)
        web = ports("80/TCP:8080:web")
        spec = {"type": "ClusterIP", "clusterIP": "10.96.5.1", "clusterIPs": ["10.96.5.1"], "ports": [{"name": "web", "port": 80, "protocol": "TCP", "targetPort": 8080}]}
        meta = {"name": "late", "namespace": "rows", "resourceVersion": "1", "uid": "1"}
        api.items["services"] = [{"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}]
        api.items["endpointslices"] = [{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                                        "metadata": {**meta, "labels": {"kubernetes.io/service-name": "late"}},
                                        "ports": [{"name": p["name"], "port": p["target"], "protocol": "TCP"} for p in web],
                                        "endpoints": [{"addresses": [host.address], "conditions": {"ready": True}}]}]
        config = {"node": {"name": "late"}, "kube": {"api": api.url}, "dns": {"enable": False},
                  "tunnel": {"enable": False}, "proxy": {"backend": w.agent.config["proxy"]["backend"], "interfaces": ["lo"]}}
        agent = Agent(host, "late", None, config, w.agent.env).start()
        try:
            expect(api.asked.wait(10), f"it lists the slices; {agent.tail()}")
            until, tried = time.monotonic() + 3, 0
            while time.monotonic() < until:
                tried += 1
                try:
                    w.ask("10.96.5.1", node=host, timeout=0.5)
                    raise AssertionError("served by nobody?")
                except ConnectionRefusedError as e:
                    raise AssertionError(f"refused before the slices were there; {agent.tail()}") from e
                except OSError:
                    pass
            api.late.set()
            wait_for(lambda: w.tries(w.ask, "10.96.5.1", node=host, timeout=1) == "late", 10, what=lambda: f"it serves; {agent.tail()}")
            return f"none of {tried} refused while the slices were not there"
        finally:
            api.late.set()
            agent.stop()
            end_api(api)
            served.close()
    case(92, "no-refusals-before-the-first-sync", nobody_is_refused_at_first)

    def bursts():
        before, begin = w.agent.counters()["proxy_rule_syncs"], time.monotonic()
        for n in range(100):
            w.kube.service("r93", "10.96.1.93", ports(f"{1000 + n}/TCP:8080"), [w.a] if n % 2 else [])
            w.kube.write()
            time.sleep(0.01)
        took = time.monotonic() - begin
        wait_for(lambda: w.tries(w.ask, "10.96.1.93", 1099, timeout=1) == "a", 10, what="the last change is followed")
        more = w.agent.counters()["proxy_rule_syncs"] - before
        expect(more <= 5 + took, f"{more} transactions in {took:.1f} s")
        return f"{more} transactions for 100 changes in {took:.1f} s"
    case(93, "bursts", bursts)
    case(91, "very-many-services", lambda: Crowd(w).run())

    def hindered():
        """What keeps us from the rules is said and tried again, and ends nobody."""
        def change(endpoints):
            w.kube.service("r95", "10.96.1.95", ports("80/TCP:8080"), endpoints)
            w.kube.write()

        def errors():
            return w.agent.text().count(" WARN ")
        before = errors()
        hindrance = Hindrance(w.one.gateway, w.backend, w.agent.env)
        change([w.a])
        try:
            wait_for(lambda: errors() > before, 40, what=lambda: f"it is said; {w.agent.tail()}")
            eq(w.tries(w.ask, "10.96.1.95", timeout=1), None)
            expect(w.agent.process.alive(), "it has ended")
        finally:
            hindrance.end()
        begin = time.monotonic()
        wait_for(lambda: w.tries(w.ask, "10.96.1.95", timeout=1) == "a", RETRY + 15, what=lambda: f"it serves; {w.agent.tail()}")
        return f"serves {time.monotonic() - begin:.1f} s after it was let"
    case(95, "hindered", hindered)

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

    def after_idle():
        left = IDLE + SWEEP - (time.monotonic() - w.idle_since)
        time.sleep(max(0.0, left))
        eq(w.datagram("10.96.1.25", s=w.idle), b"a:ping")
        fresh = w.udp[0].seen - w.idle_seen
        w.idle.close()
        expect(fresh, "the endpoint sees the old session's port")
        return f"a new session after {time.monotonic() - w.idle_since:.0f} s"
    if hasattr(w, "idle"):
        case(58, "after-a-long-idle-time", after_idle)

    if hasattr(w, "health"):
        try:
            case(89, "unwell-when-hindered", w.health.unwell)
        finally:
            w.health.end()

    def clean():
        code = w.agent.stop()
        left = w.one.gateway.run("sh", "-c", f"nft list ruleset; {w.backend if w.backend != 'nft' else 'iptables-nft'}-save;"
                                     f"ip6tables-{'legacy' if 'legacy' in w.backend else 'nft'}-save; ip addr; ip route; ip -6 route")
        eq((code, "weft" in left.lower()), (0, False))
    case(94, "nothing-left", clean)
