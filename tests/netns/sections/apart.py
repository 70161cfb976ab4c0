"""F: rows that want an agent of their own: its health, and many Services."""
import contextlib
import http.server
import json
import os
import threading
import time

from natlab import wait_for
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
    def serve(cls, host, **items):
        api = http.server.ThreadingHTTPServer(("", 0), cls, bind_and_activate=False)
        api.socket.close()
        api.socket, api.daemon_threads = host.listen(0, "127.0.0.1"), True
        api.late, api.over, api.asked = threading.Event(), threading.Event(), threading.Event()
        api.items, api.url = {"nodes": [], **items}, f"http://127.0.0.1:{api.socket.getsockname()[1]}"
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


class Hindrance:
    """Keeps an agent from the rules until it is taken away: weft0 is somebody else's, or iptables has no lock to give."""

    def __init__(self, node, backend, env):
        self.node, self.tools, self.real = node, [], None
        if backend == "nft":
            node.ip("link del weft0", "link add weft0 type bridge")
            return
        folder = env["PATH"].split(":")[0]
        # By the one name or the other, as there are tables of iptables-legacy or not.
        self.tools = [f"{folder}/iptables-restore", f"{folder}/{backend}-restore"]
        self.real = os.readlink(self.tools[0])
        for tool in self.tools:
            with open(f"{tool}.new", "w", encoding="ascii") as f:
                # As it ends when another holds the lock for longer than it waits.
                f.write(f'#!/bin/sh\n[ "$1" = --version ] && exec {self.real} "$@"\n'
                        "echo 'Another app is currently holding the xtables lock; waited 5s' >&2; exit 4\n")
            os.chmod(f"{tool}.new", 0o755)
            os.replace(f"{tool}.new", tool)

    def end(self):
        if not self.tools:
            self.node.ip("link del weft0")
        for tool in self.tools:
            os.unlink(tool)
            os.symlink(self.real, tool)


class Healthy:
    """An agent of its own on a host of its own, and what it says of itself."""

    def __init__(self, w):
        self.host, self.backend = w.lab.host("health"), w.backend
        self.env = variant(w.lab, w.backend, "health-tools") if w.backend != "nft" else None
        self.api = LateApi.serve(self.host, services=[], endpointslices=[])
        config = {"node": {"name": "health"}, "kube": {"api": self.api.url}, "tunnel": {"enable": False},
                  "proxy": {"backend": w.agent.config["proxy"]["backend"]}, "admin": {"http": f"127.0.0.1:{HTTP}"}}
        self.agent = Agent(self.host, "health", None, config, self.env).start()
        self.hindrance, self.since = None, None

    def ask(self, path, head="GET {} HTTP/1.1\r\nHost: weft\r\n\r\n"):
        with self.host.tcp("127.0.0.1", HTTP, timeout=5) as s:
            s.sendall(head.format(path).encode())
            head, _, body = read_all(s).decode().partition("\r\n\r\n")
            return int(head.split()[1]), body.strip()

    def becomes(self, code, what, patience):
        wait_for(lambda: self.ask("/healthz")[0] == code, patience, 0.2,
                 what=lambda: f"{what}; it says {self.ask('/healthz')}; {self.agent.tail()}")
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
        return f"{why}; {took:.0f} s after it was hindered"

    def end(self):
        if self.hindrance:
            self.hindrance.end()
        self.agent.stop()
        end_api(self.api)
