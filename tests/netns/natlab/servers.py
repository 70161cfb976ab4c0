"""Small servers for labs: a web server, TCP services for tests, a DNS server. In this process (their sockets are in
the namespace) or, where they must outlive it, as `python3 -m natlab.servers web|dns …` started inside one."""
import contextlib
import hashlib
import http.server
import json
import socket
import struct
import sys
import threading

BLOCK = 1 << 16


def pattern(count, begin=0):
    """`count` bytes in which each block differs, so that what is lost, doubled or out of order changes the hash."""
    body = hashlib.shake_256(b"weft lab").digest(BLOCK - 8)
    number = begin
    while count > 0:
        block = struct.pack(">Q", number) + body
        yield block[:count]
        count -= len(block)
        number += 1


def pattern_sha256(count):
    digest = hashlib.sha256()
    for block in pattern(count):
        digest.update(block)
    return digest.hexdigest()


class Web(http.server.BaseHTTPRequestHandler):
    """GET / greets, GET /bytes/N gives the pattern, POST /sum gives length and SHA-256 of what it got."""
    server_version, sys_version = "lab", ""

    def do_GET(self):  # noqa: N802: http.server's name
        if self.path.startswith("/bytes/") and self.path[7:].isdigit():
            count = int(self.path[7:])
            self._head(200, count)
            with contextlib.suppress(OSError):
                for block in pattern(count):
                    self.wfile.write(block)
        elif self.path == "/":
            self._text(200, f"{self.server.title} answers {self.client_address[0]}\n")
        else:
            self._text(404, "no such page\n")

    def do_POST(self):  # noqa: N802
        left, digest = int(self.headers.get("content-length", 0)), hashlib.sha256()
        total = left
        while left > 0:
            piece = self.rfile.read(min(left, BLOCK))
            if not piece:
                return
            digest.update(piece)
            left -= len(piece)
        self._text(200, f"{total} {digest.hexdigest()}\n")

    def _head(self, code, length):
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def _text(self, code, text):
        self._head(code, len(text.encode()))
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


class _WebServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # a client that went away is no event


def web(listener, title):
    """Serves on a listening socket, in a thread of its own."""
    server = _WebServer(("", 0), Web, bind_and_activate=False)
    server.socket.close()
    server.socket, server.title = listener, title
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 60}, daemon=True).start()
    return server


class Service:
    """A TCP service for tests: a thread for each connection; counts them."""

    def __init__(self, node, port, handle, address="0.0.0.0"):
        self.listener = node.listen(port, address)
        self.accepted, self.open, self.most = 0, 0, 0
        self._handle, self._lock = handle, threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                conn, peer = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(conn, peer), daemon=True).start()

    def _serve(self, conn, peer):
        with self._lock:
            self.accepted += 1
            self.open += 1
            self.most = max(self.most, self.open)
        try:
            with conn, contextlib.suppress(OSError):
                self._handle(conn, peer)
        finally:
            with self._lock:
                self.open -= 1

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def echo_at_end(conn, _peer):
    """Sends all back, but only after the client has shut down its writing."""
    kept = []
    while piece := conn.recv(BLOCK):
        kept.append(piece)
    conn.sendall(b"".join(kept))


def echo(conn, _peer):
    while piece := conn.recv(BLOCK):
        conn.sendall(piece)


def says(text):
    def handle(conn, peer):
        conn.sendall(f"{text} {peer[0]}\n".encode())
    return handle


def gives(count):
    """Sends the pattern, whatever the client says."""
    def handle(conn, _peer):
        for block in pattern(count):
            conn.sendall(block)
    return handle


def dns_answer(query, zone):
    """Answers an A question from `zone`, NODATA for other types of its names, NXDOMAIN for other names."""
    ident, flags, questions = struct.unpack_from(">HHH", query)
    if questions != 1 or flags & 0x8000:
        return None
    at, labels = 12, []
    while query[at]:
        labels.append(query[at + 1:at + 1 + query[at]].decode("ascii", "replace"))
        at += 1 + query[at]
    question = query[12:at + 5]
    kind, _class = struct.unpack_from(">HH", query, at + 1)
    address = zone.get(".".join(labels).lower())
    code = 0 if address else 3
    answers = int(bool(address) and kind == 1)
    out = struct.pack(">HHHHHH", ident, 0x8180 | (flags & 0x0100) | code, 1, answers, 0, 0) + question
    if answers:
        out += struct.pack(">HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(address)
    return out


def dns(udp, listener, zone):
    """Serves both transports, each in its thread."""
    def over_udp():
        while True:
            try:
                data, peer = udp.recvfrom(4096)
                with contextlib.suppress(struct.error, IndexError):
                    if answer := dns_answer(data, zone):
                        udp.sendto(answer, peer)
            except TimeoutError:
                continue
            except OSError:
                return

    def over_tcp():
        while True:
            try:
                conn, _ = listener.accept()
            except OSError:
                return
            with conn, contextlib.suppress(OSError, struct.error, IndexError):
                conn.settimeout(2)
                stream = conn.makefile("rb")
                length = struct.unpack(">H", stream.read(2))[0]
                if answer := dns_answer(stream.read(length), zone):
                    conn.sendall(struct.pack(">H", len(answer)) + answer)

    for work in (over_udp, over_tcp):
        threading.Thread(target=work, daemon=True).start()


def main(what, address, port, argument):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, int(port)))
    listener.listen(64)
    if what == "web":
        web(listener, argument)
    elif what == "dns":
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((address, int(port)))
        dns(udp, listener, json.loads(argument))
    else:
        raise SystemExit(f"no server {what!r}")
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
