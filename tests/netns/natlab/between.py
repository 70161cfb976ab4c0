"""A TLS server in front of a real API server that hands everything on (with an administrator's rights), and on command
tells each watch that its version is too old (410): so an agent lists anew, from the real server's bytes, as often as one
likes. It records events, and plays them again as fast as one likes."""
import contextlib
import http.client
import json
import select
import socket
import threading

EXPIRED = json.dumps({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired",
                                                  "message": "too old resource version"}}).encode() + b"\n"
# Of the bookmark behind the objects of a WatchList.
ALL_SENT = b'"k8s.io/initial-events-end":"true"'


class Between:
    def __init__(self, server, port=6444):
        self.server, self.port = server, port
        # Watches that have sent what there was, each with its lock and path: events come from one thread, the end from
        # another.
        self.watches, self.lock, self.requests = {}, threading.Lock(), 0
        # What came in watches since record(), by path.
        self.tapes = None
        self.tls = server.server_side()
        self.socket = server.node.listen(port)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"https://{self.server.node.address}:{self.port}"

    def expire(self):
        """Ends each watch with 410; how many there were."""
        with self.lock:
            watches, self.watches = self.watches, {}
        for sock, (lock, _) in watches.items():
            with lock:
                sock.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(EXPIRED), EXPIRED))
        return len(watches)

    def record(self):
        self.tapes = {}

    def recorded(self, resource):
        """The changes since record(), as the server has written them."""
        tape = b"".join(piece for path, pieces in self.tapes.items() if f"/{resource}?" in path for piece in pieces)
        return [line + b"\n" for line in tape.split(b"\n")[:-1] if line.startswith(b'{"type":"MODIFIED"')]

    def play(self, resource, event):
        """An event to each watch of the resource; how many there are."""
        with self.lock:
            watches = [(sock, lock) for sock, (lock, path) in self.watches.items() if f"/{resource}?" in path]
        for sock, lock in watches:
            with lock:
                sock.sendall(b"%x\r\n%s\r\n" % (len(event), event))
        return len(watches)

    def _accept(self):
        while True:
            sock, _ = self.socket.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, plain):
        try:
            with self.tls.wrap_socket(plain, server_side=True) as sock:
                while head := self._head(sock):
                    self._answer(sock, head)
        except OSError:
            plain.close()

    def _gone(self, sock, upstream):
        """A client that has closed watches no more, though nothing is written to it that would tell."""
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLRDHUP)
        poll.poll()
        with self.lock:
            self.watches.pop(sock, None)
        with contextlib.suppress(OSError):
            if upstream.sock:
                socket.socket.shutdown(upstream.sock, socket.SHUT_RDWR)

    @staticmethod
    def _head(sock):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(4096)
            if not byte:
                return None
            head += byte
        return head.decode()

    def _answer(self, sock, head):
        path = head.split(" ")[1]
        upstream = self.server.connection()
        upstream.request("GET", path, headers={"Accept": "application/json"})
        answer = upstream.getresponse()
        self.requests += 1
        lock = threading.Lock()
        sock.sendall(f"HTTP/1.1 {answer.status} x\r\nContent-Type: {answer.headers['Content-Type']}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        if "watch=1" in path:
            threading.Thread(target=self._gone, args=(sock, upstream), daemon=True).start()
        is_watch, is_whole, tail = "watch=1" in path, "sendInitialEvents" not in path, b""
        if is_watch and is_whole:
            with self.lock:
                self.watches[sock] = lock, path
        try:
            while piece := answer.read1(65536):
                with lock:
                    if is_watch and is_whole and sock not in self.watches:
                        return
                    sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                if self.tapes is not None:
                    self.tapes.setdefault(path, []).append(piece)
                if is_watch and not is_whole:
                    # In the middle of an event no other can be told.
                    is_whole = ALL_SENT in tail + piece and piece.endswith(b"\n")
                    tail = (tail + piece)[-4096:]
                    if is_whole:
                        with self.lock:
                            self.watches[sock] = lock, path
            with lock:
                sock.sendall(b"0\r\n\r\n")
        except http.client.HTTPException:
            sock.close()
        finally:
            with self.lock:
                self.watches.pop(sock, None)
            upstream.close()
