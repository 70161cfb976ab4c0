"""C: no endpoints, readiness, termination."""
from natlab import wait_for
from report import expect
from stage import refused

from .world import eq, ports, seen


def rows_c(w, case):
    def none(node):
        expect(w.refused_udp("10.96.1.40", 53, node), "UDP is not refused")
        return f"{refused(node, '10.96.1.40') * 1000:.1f} ms"
    case(40, "no-endpoint", lambda: ", ".join(none(n) for n in w.clients().values()))

    def evicted():
        w.kube.service("r41", "10.96.1.41", ports("80/TCP:8080"), [w.a])
        w.kube.write()
        wait_for(lambda: w.tries(w.ask, "10.96.1.41", timeout=1), 10, what="it serves")
        w.kube.service("r41", "10.96.1.41", ports("80/TCP:8080"), [])
        w.kube.write()
        def now():
            try:
                w.ask("10.96.1.41", timeout=1)
            except ConnectionRefusedError:
                return True
            except OSError:
                pass
            return False
        wait_for(now, 10, what="refused")
    case(41, "evicted", evicted)
    case(42, "unknown-port", lambda: refused(w.one.client, "10.96.1.1", 9999))
    case(44, "unready", lambda: eq(set(seen(w, "10.96.1.44", 10)), {"a"}))
    case(45, "publish-not-ready", lambda: eq(w.ask("10.96.1.45"), "a"))
    case(46, "ready-is-absent", lambda: eq(w.ask("10.96.1.46"), "a"))
    case(47, "terminating-is-the-last-resort", lambda: eq((set(seen(w, "10.96.1.47", 10)), set(seen(w, "10.96.2.47", 10))), ({"a"}, {"b"})))
    case(48, "hairpin", lambda: eq(w.ask("10.96.2.9", node=w.one.web), "a"))
    case(49, "a-dead-endpoint-is-passed-over", lambda: eq(set(seen(w, "10.96.1.49", 100)), {"gone"}))

    def udp_dead():
        # The datagram that finds out is lost, as on any link; the next goes elsewhere.
        for _ in range(6):
            with w.one.client.udp(timeout=1.0) as s:
                eq(any(w.tries(w.datagram, "10.96.2.49", s=s) == b"a4:ping" for _ in range(3)), True)
    case(49, "a-dead-endpoint-is-passed-over.udp", udp_dead)
    case(50, "affinity-leaves-a-dead-endpoint", lambda: eq(set(seen(w, "10.96.1.50", 10)), {"gone"}))
