"""Lists of an API server and watches that tell nothing, from a file of manifests: what CoreDNS needs to come up.

usage: kube_api.py PORT MANIFESTS"""
import http.server
import json
import sys
import threading

PATHS = {"/api/v1/namespaces": "Namespace", "/api/v1/services": "Service", "/api/v1/pods": "Pod",
         "/apis/discovery.k8s.io/v1/endpointslices": "EndpointSlice"}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        kind = PATHS.get(path)
        if path == "/version":
            return self.say(200, {"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
        if kind is None or "sendInitialEvents=true" in query:
            # 422: a server from before WatchList; then it is listed.
            code, reason = (404, "NotFound") if kind is None else (422, "Invalid")
            return self.say(code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code})
        if "watch=true" in query or "watch=1" in query:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.flush()
            return threading.Event().wait()
        version = "discovery.k8s.io/v1" if kind == "EndpointSlice" else "v1"
        return self.say(200, {"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": "1"},
                              "items": self.server.items.get(kind, [])})

    def say(self, code, what):
        body = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    with open(sys.argv[2], encoding="utf-8") as f:
        items = json.load(f)["items"]
    spaces = sorted({item["metadata"]["namespace"] for item in items})
    server.items = {"Namespace": [{"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": n, "resourceVersion": "1"}}
                                  for n in spaces]}
    for number, item in enumerate(items):
        item["metadata"] |= {"resourceVersion": "1", "uid": f"00000000-0000-0000-0000-{number:012}"}
        server.items.setdefault(item["kind"], []).append(item)
    server.serve_forever()


if __name__ == "__main__":
    main()
