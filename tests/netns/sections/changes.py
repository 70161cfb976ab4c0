"""B: changes while running."""
import re
import socket
import time

from natlab import kernel, wait_for
from report import expect
from stage import read_all

from .world import ports, rules, seen


def rows_b(w, case):
    kube, web = w.kube, ports("80/TCP:8080")
    serves = lambda ip, want="a", port=80: wait_for(lambda: w.tries(w.ask, ip, port, timeout=1) == want, 10, what=f"{ip} serves {want}")
    gone = lambda ip, port=80: wait_for(lambda: w.tries(w.ask, ip, port, timeout=1) is None, 10, what=f"{ip}:{port} is gone")

    def changed(*args, **kw):
        kube.service(*args, **kw)
        kube.write()

    def new():
        changed("r28", "10.96.1.28", web, [w.a])
        serves("10.96.1.28")
    case(28, "new", new)

    def before():
        """Who tried before the Service was there is served by it, also from the same port, of which conntrack knows another way."""
        def attempt(port):
            with kernel.inside(w.one.client.ns), socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.settimeout(1)
                s.bind(("0.0.0.0", port))
                port = s.getsockname()[1]
                try:
                    s.connect(("10.96.3.28", 80))
                except OSError:
                    return port, None
                return port, read_all(s).decode().split()[0]
        port, nobody = attempt(0)
        expect(nobody is None, f"{nobody} answers before there is a Service")
        changed("r28before", "10.96.3.28", web, [w.a])
        serves("10.96.3.28")
        # The flows are looked at right after the rules are written.
        wait_for(lambda: attempt(port) == (port, "a"), 5, 0.5, what="it is served from the same port")
    case(28, "new.to-who-tried-before", before)

    def deleted():
        with w.one.client.tcp("10.96.1.29", 7000) as held:
            held.sendall(b"before ")
            del kube.items["r29"]
            kube.write()
            wait_for(lambda: w.tries(lambda: w.one.client.tcp("10.96.1.29", 7000, timeout=1).close() or 1) is None, 10, what="it is gone")
            held.sendall(b"after")
            held.shutdown(socket.SHUT_WR)
            expect(read_all(held) == b"before after", "the live connection was cut")
    case(29, "deleted.live-connections-stay", deleted)

    def again():
        changed("r28", "10.96.2.28", web, [w.a])
        serves("10.96.2.28")
        gone("10.96.1.28")
    case(30, "made-again-with-another-address", again)

    def its_ports():
        changed("r28", "10.96.2.28", ports("80/TCP:8080:x", "81/TCP:8081:y"), [w.a])
        serves("10.96.2.28", "a2", 81)
        changed("r28", "10.96.2.28", ports("80/TCP:8080:x", "82/TCP:8081:y"), [w.a])
        serves("10.96.2.28", "a2", 82)
        gone("10.96.2.28", 81)
    case(31, "ports-change", its_ports)

    def loop(change, ip, seconds=3.0):
        """100 requests a second while something changes: none may fail."""
        bad, n, end, done = [], 0, time.monotonic() + seconds, False
        while time.monotonic() < end:
            if not done and time.monotonic() > end - seconds + 0.3:
                change()
                done = True
            try:
                w.ask(ip)
            except OSError as e:
                bad.append(repr(e))
            n += 1
            time.sleep(0.01)
        expect(not bad, f"{len(bad)} of {n}: {bad[:3]}; {w.agent.tail(5)}")
        return f"{n} of {n}"
    changed("r28", "10.96.2.28", web, [w.a])
    serves("10.96.2.28")
    case(32, "port-renamed", lambda: loop(lambda: changed("r28", "10.96.2.28", ports("80/TCP:8080:other"), [w.a]), "10.96.2.28"))

    def protocol():
        changed("r33", "10.96.1.33", ports("53/TCP:8080"), [w.a])
        serves("10.96.1.33", port=53)
        changed("r33", "10.96.1.33", ports("53/UDP:5300"), [w.a])
        wait_for(lambda: w.tries(w.datagram, "10.96.1.33", timeout=1) == b"a:ping", 10, what="UDP now")
        gone("10.96.1.33", 53)
    case(33, "protocol-changes", protocol)

    def kinds():
        changed("r34", "10.96.1.34", web, [w.a], type="ExternalName", externalName="x.example")
        expect(w.tries(w.ask, "10.96.1.34", timeout=1) is None, "ExternalName is served")
        changed("r34", "10.96.1.34", web, [w.a])
        serves("10.96.1.34")
        changed("r34", "10.96.1.34", web, [w.a], type="NodePort")
        serves("10.96.1.34")
        changed("r34", "", web, [w.a], type="ExternalName", externalName="x.example")
        gone("10.96.1.34")
    case(34, "type-changes", kinds)
    case(35, "endpoints-roll", lambda: loop(lambda: changed("r28", "10.96.2.28", web, [w.b]), "10.96.2.28"))

    def merged():
        got = seen(w, "10.96.1.36")
        expect((got.count("a"), got.count("b")) == (10, 10), got)
    case(36, "slices-are-merged", merged)

    def order():
        changed("r28", "10.96.2.28", web, slices=[(web, [w.a]), (web, [w.b])])
        return loop(lambda: changed("r28", "10.96.2.28", web, [w.a]), "10.96.2.28")
    case(37, "new-slice-first", order)
    def ready(a, b):
        changed("r51", "10.96.1.51", web, [(*w.a, {"ready": a}), (*w.b, {"ready": b})])
    ready(True, False)
    serves("10.96.1.51")
    case(51, "readiness-flips", lambda: loop(lambda: ready(False, True), "10.96.1.51"))
    case(38, "endpoints-object", lambda: expect(w.ask("10.96.1.38") == "a", "no"))

    def restart():
        before = rules(w)
        w.agent.kill()
        w.agent.start()
        wait_for(lambda: w.tries(w.ask, "10.96.1.1", timeout=1), 10, what="it works after a restart")
        # The ports that we listen on are others.
        shape = lambda text: sorted(re.findall(r"(?:chain |:WEFT-(?!MADE))\S+|10\.96\.\d+\.\d+", text))
        wait_for(lambda: shape(rules(w)) == shape(before), 5, what=lambda: f"the same rules: {set(shape(before)) ^ set(shape(rules(w)))}")
    case(39, "restart", restart)

    def flushed():
        if w.backend == "nft":
            w.one.gateway.run("nft", "flush", "ruleset")
        else:
            w.one.gateway.run(w.backend, "-t", "nat", "-F")
        begin = time.monotonic()
        wait_for(lambda: w.tries(w.ask, "10.96.1.1", timeout=1), 15, what="rules are put back")
        return f"{time.monotonic() - begin:.1f} s"
    case("39a", "flushed", flushed)
