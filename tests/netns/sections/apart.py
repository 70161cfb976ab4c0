"""F: rows that want an agent of their own: its health, and many Services."""
import contextlib
import http.server
import json
import os
import signal
import threading
import time

from natlab import servers, wait_for, weft
from natlab.weft import Agent
from report import expect
from stage import read_all

from .world import eq, variant

# src/rules.rs: between two looks at the rules; src/health.rs: the most clients at once.
RECHECK, CLIENTS = 30, 8
HTTP = 7844


class LateApi(http.server.BaseHTTPRequestHandler):
    """An API server that lists the Services at once and the slices later."""
    protocol_version = "HTTP/1.1"

    @classmethod
    def serve(cls, host, port=0, **items):
        api = http.server.ThreadingHTTPServer(("", 0), cls, bind_and_activate=False)
        api.socket.close()
        api.socket, api.daemon_threads = host.listen(port, "127.0.0.1"), True
        api.late, api.over, api.asked = threading.Event(), threading.Event(), threading.Event()
        api.port = api.socket.getsockname()[1]
        api.items, api.url = {"nodes": [], **items}, f"http://127.0.0.1:{api.port}"
        threading.Thread(target=api.serve_forever, daemon=True).start()
        return api

    def do_GET(self):  # noqa: N802
        path, _, query = self.path.partition("?")
        kind = path.rsplit("/", 1)[-1]
        items = self.server.items.get(kind)
        if "sendInitialEvents" in query or items is None:
            return self.say(422 if items is not None else 404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "code": 422})
        if "watch=" in query:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.server.over.wait()
            self.close_connection = True
            return None
        if kind == "endpointslices":
            self.server.asked.set()
            self.server.late.wait()
        return self.say(200, {"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})

    def say(self, code, body):
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def end_api(api):
    for event in (api.late, api.over):
        event.set()
    api.shutdown()
    api.server_close()


class Hindrance:
    """Keeps an agent from the rules until it is taken away: weft0 is somebody else's, or iptables has no lock to give."""

    def __init__(self, node, backend, env):
        self.node, self.tools = node, {}
        if backend == "nft":
            node.ip("link del weft0", "link add weft0 type bridge")
            return
        folder = env["PATH"].split(":")[0]
        # By the one name or the other, as there are tables of iptables-legacy or not.
        tools = [f"{folder}/{name}-{what}" for name in ("iptables", backend) for what in ("restore", "save")]
        self.tools = {tool: os.readlink(tool) for tool in tools}
        for tool, real in self.tools.items():
            with open(f"{tool}.new", "w", encoding="ascii") as f:
                # As it ends when another holds the lock for longer than it waits.
                f.write(f'#!/bin/sh\n[ "$1" = --version ] && exec {real} "$@"\n'
                        "echo 'Another app is currently holding the xtables lock; waited 5s' >&2; exit 4\n")
            os.chmod(f"{tool}.new", 0o755)
            os.replace(f"{tool}.new", tool)

    def end(self):
        if not self.tools:
            self.node.ip("link del weft0")
        for tool, real in self.tools.items():
            os.unlink(tool)
            os.symlink(real, tool)


class Healthy:
    """An agent of its own on a host of its own, and what it says of itself."""

    def __init__(self, w):
        self.host, self.backend = w.lab.host("health"), w.backend
        self.env = variant(w.lab, w.backend, "health-tools") if w.backend != "nft" else None
        self.api = LateApi.serve(self.host, services=[], endpointslices=[])
        config = {"node": {"name": "health"}, "kube": {"api": self.api.url}, "tunnel": {"enable": False},
                  "proxy": {"backend": w.agent.config["proxy"]["backend"]}, "admin": {"http": f"127.0.0.1:{HTTP}"}}
        self.agent = Agent(self.host, "health", None, config, self.env).start()
        self.hindrance, self.since, self.port = None, None, HTTP

    def ask(self, path, head="GET {} HTTP/1.1\r\nHost: weft\r\n\r\n"):
        with self.host.tcp("127.0.0.1", self.port, timeout=5) as s:
            s.sendall(head.format(path).encode())
            head, _, body = read_all(s).decode().partition("\r\n\r\n")
            return int(head.split()[1]), body.strip()

    def becomes(self, code, what, patience):
        def is_so():
            # A reload may be on its way.
            with contextlib.suppress(ConnectionError):
                return self.ask("/healthz")[0] == code
            return False
        wait_for(is_so, patience, 0.2, what=lambda: f"{what}; {self.agent.tail()}")
        eq(self.ask("/livez"), (200, "ok"))
        return self.ask("/healthz")

    def begin(self):
        expect(self.api.asked.wait(10), "it lists the slices")
        before = self.ask("/healthz")
        expect(before[0] == 503 and before[1].startswith("table:"), before)
        eq(self.ask("/livez"), (200, "ok"))
        self.api.late.set()
        self.becomes(200, "with the list it is well", 15)
        eq((self.ask("/metrics")[0], self.ask("/livez", "POST {} HTTP/1.1\r\n\r\n")[0], self.ask("", "a\r\n\r\n{}")[0]), (404, 405, 400))
        eq(self.ask("/livez", "GET {} HTTP/1.1\r\nA: " + "a" * 4000)[0], 431)
        with contextlib.ExitStack() as idle:
            for _ in range(CLIENTS):
                idle.enter_context(self.host.tcp("127.0.0.1", HTTP, timeout=5))
            eq(self.ask("/healthz"), (200, "ok"))
        self.hindrance, self.since = Hindrance(self.host, self.backend, self.env), time.monotonic()
        eq(self.ask("/healthz"), (200, "ok"))
        return before[1]

    def unwell(self):
        # The last good look may be so old already, or comes just before the hindrance.
        code, why = self.becomes(503, "two periods after its last good look it is not well", 3 * RECHECK)
        took = time.monotonic() - self.since
        expect(why.startswith("rules: not synced for ") and ": " in why[8:], why)
        expect(took > RECHECK, f"unwell {took:.0f} s after one look could fail")
        self.hindrance.end()
        self.hindrance = None
        self.becomes(200, "it is well again", 2 * RECHECK + 15)
        self.moves()
        return f"{why}; {took:.0f} s after it was hindered"

    def moves(self):
        """By a reload: elsewhere, then nowhere."""
        for at in (HTTP + 1, None):
            before, self.port = self.port, at
            self.agent.config["admin"]["http"] = f"127.0.0.1:{at}" if at else ""
            self.agent.configure()
            self.agent.process.signal(signal.SIGHUP)
            if at:
                self.becomes(200, "it answers elsewhere", 10)
            def is_gone(port=before):
                try:
                    self.host.tcp("127.0.0.1", port, timeout=5).close()
                except ConnectionRefusedError:
                    return True
                except ConnectionResetError:
                    pass  # it has just been closed
                return False
            wait_for(is_gone, 10, what="nobody listens where it was")

    def end(self):
        if self.hindrance:
            self.hindrance.end()
        self.agent.stop()
        end_api(self.api)


# tests/bench/rules measures them; what is here are bounds that a run must keep on any machine.
SERVICES, ENDPOINTS = 10_000, 5
# Resident, but for the executable's own pages, with them all: 11 to 12 MB were measured.
ANON_MOST = 15 << 20
# Transactions of the first sync, programs that it runs, rules beside one for each Service.
FIRST, RUNS, MORE_RULES = 3, 16, 60
# Programs of iptables for one change: the rules are looked at, written in one transaction, and looked at again; and it may be
# time for a look in between.
CHANGE = 4


class Crowd:
    """Very many Services, all by one manifest, and one of them that is really there."""

    def __init__(self, w):
        self.host, self.backend, self.lab = w.lab.host("crowd"), w.backend, w.lab
        self.served = servers.Service(self.host, 8080, servers.says("crowd"))
        self.path, self.runs, self.lines = (f"{w.lab.folder}/crowd-{w.backend}.{what}" for what in ("json", "runs", "lines"))
        self.port, self.spare = 80, "10.255.0.1"
        self.write()
        env = self.counted("iptables-nft" if w.backend == "nft" else w.backend)
        config = {"node": {"name": "crowd"}, "kube": {"manifests": [self.path]}, "tunnel": {"enable": False}, "dns": {"enable": False},
                  "proxy": {"backend": w.agent.config["proxy"]["backend"], "interfaces": ["lo"]}}
        self.agent = Agent(self.host, "crowd", None, config, env)

    def write(self):
        def endpoints(n):
            if n < 2:
                return [(self.host.address if n == 0 else self.spare, "crowd")]
            return [(f"10.{128 + n // 8000}.{n // 32 % 250}.{n % 32 * 7 + i + 1}", f"node-{(n + i) % 8}") for i in range(ENDPOINTS)]
        services = [weft.service(f"svc-{n}", f"10.{96 + n // 60_000}.{n // 250 % 240}.{n % 250 + 1}", self.port if n == 0 else 80,
                                 endpoints(n), 8080) for n in range(SERVICES)]
        weft.write(self.path, weft.manifests(services, None))

    def counted(self, kind):
        """iptables that notes each time that it is run, and how many lines it is told."""
        env = variant(self.lab, kind, f"crowd-{kind}")
        folder = env["PATH"].split(":")[0]
        for name in os.listdir(folder):
            real = os.readlink(f"{folder}/{name}")
            os.unlink(f"{folder}/{name}")
            count = 'case "$*" in *--noflush*) tee -a ' + self.lines + f' | {real} "$@"; exit $?;; esac\n' if "restore" in name else ""
            with open(f"{folder}/{name}", "w", encoding="ascii") as f:
                f.write(f'#!/bin/sh\necho {name} "$@" >> {self.runs}\n{count}exec {real} "$@"\n')
            os.chmod(f"{folder}/{name}", 0o755)
        weft.write(self.runs, "")
        weft.write(self.lines, "")
        return env

    def counts(self):
        """Transactions, programs run, lines that they were told."""
        both = []
        for path in (self.runs, self.lines):
            with open(path, encoding="ascii") as f:
                both.append(sum(not line.startswith("#") for line in f))
        return [self.agent.counters()["proxy_rule_syncs"], *both]

    def rested(self):
        """The same when a sync is over: longer than the lull after which one begins nothing has changed."""
        last = self.counts()
        for _ in range(60):
            time.sleep(0.5)
            before, last = last, self.counts()
            if before == last:
                return last
        raise AssertionError(f"it does not come to rest; {self.agent.tail()}")

    def serves(self, port):
        with contextlib.suppress(OSError), self.host.tcp("10.96.0.1", port, timeout=1) as s:
            return read_all(s).startswith(b"crowd")
        return False

    def change(self):
        """What one change of one Service costs: of its port; then of an endpoint of another, which is no matter of the rules."""
        before = self.rested()
        with monitor(self.host) if self.backend == "nft" else contextlib.nullcontext([]) as heard:
            self.port = 81
            self.write()
            wait_for(lambda: self.serves(81), 60, 0.1, what=lambda: f"the change is followed; {self.agent.tail()}")
        eq(self.serves(80), False)
        cost = [a - b for a, b in zip(self.rested(), before)]
        expect(cost[0] == 1, f"{cost[0]} transactions; {self.agent.tail()}")
        if self.backend == "nft":
            elements = [line for line in heard if "element" in line]
            expect(sorted(line.split()[0] for line in elements) == ["add", "delete"] and all("10.96.0.1 " in line for line in elements), heard[:20])
            expect(not any("table" in line.split()[:2] or "rule" in line.split()[:2] or "chain" in line.split()[:2] for line in heard), heard[:20])
            eq(cost[1:], [0, 0])
        else:
            # It has no elements: our chains are written anew, in one transaction.
            expect(0 < cost[1] <= CHANGE and cost[2] <= SERVICES + MORE_RULES, f"{cost[1]} programs, {cost[2]} lines")
        self.spare = "10.255.0.2"
        after = self.rested()
        self.write()
        wait_for(lambda: self.agent.ask("services", "svc-1")["services"][0]["endpoints"][0]["address"] == self.spare, 60, 0.2,
                 what="the endpoint is followed")
        # Longer than the lull after which the rules are looked at.
        time.sleep(2)
        cost_of_none = [a - b for a, b in zip(self.counts(), after)]
        # A look at the rules may come in between.
        expect(cost_of_none[0] == 0 and cost_of_none[2] == 0, f"an endpoint's change costs {cost_of_none}")
        return cost, len(heard)

    def run(self):
        try:
            self.agent.start(ready=False)
            wait_for(lambda: self.serves(80), 60, 0.1, what=lambda: f"the first sync; {self.agent.tail()}")
            first = self.rested()
            note = next(p["note"] for p in self.agent.tell("status")["parts"] if p["name"] == "rules")
            rules = int(note.split()[0])
            expect(1 <= first[0] <= FIRST and first[1] <= RUNS, f"{first[0]} transactions, {first[1]} programs")
            expect(SERVICES <= rules <= SERVICES + MORE_RULES, note)
            cost, heard = self.change()
            with open(f"/proc/{self.agent.process.pid}/status", encoding="ascii") as f:
                anon = next(int(line.split()[1]) for line in f if line.startswith("RssAnon:")) << 10
            expect(anon <= ANON_MOST, f"{anon / 1e6:.1f} MB")
            return (f"{SERVICES} Services: {rules} rules in {first[0]} transactions, {first[1]} programs; one change: {cost[0]} transaction, "
                    f"{cost[1]} programs, {heard or cost[2]} lines; {anon / 1e6:.1f} MB")
        finally:
            self.agent.stop()
            self.served.close()
            os.unlink(self.path)


@contextlib.contextmanager
def monitor(node):
    """The lines of `nft monitor` while it goes on, when it is over."""
    log, lines = f"{node.lab.folder}/{node.name}.monitor", []
    process = node.spawn("nft", "monitor", log=log)
    try:
        mark = "monitored"
        # It hears once it shows a change of our own.
        def hears():
            node.run("nft", f"add table ip {mark}; delete table ip {mark}")
            return mark in process.text()
        wait_for(hears, 10, 0.1, what="nft monitor hears")
        yield lines
        wait_for(lambda: "element" in process.text(), 10, 0.1, what="nft monitor hears the change")
    finally:
        process.end()
        lines += [line for line in process.text().splitlines() if mark not in line and not line.startswith("#")]
