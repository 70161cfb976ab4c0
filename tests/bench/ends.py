"""The two ends of a measured connection, each a process of its own: ends.py serve PORT | bulk|rtt|connect ADDRESS PORT N.

A request is one line: `bulk N` is answered with N bytes, `echo` with what follows.
"""
import json
import socket
import statistics
import sys
import threading
import time

BLOCK = bytes(1 << 20)


def answer(s):
    with s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = b""
        while not line.endswith(b"\n"):
            line += s.recv(1) or b"echo\n"
        if line.startswith(b"bulk"):
            left = int(line.split()[1])
            while left > 0:
                left -= s.send(BLOCK[:left])
        else:
            while piece := s.recv(4096):
                s.sendall(piece)


def serve(port):
    with socket.create_server(("0.0.0.0", port), backlog=512) as listener:
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def connect(address, port):
    s = socket.create_connection((address, port), 10)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.settimeout(60)
    return s


def bulk(address, port, count):
    begin, got = time.monotonic(), 0
    with connect(address, port) as s:
        s.sendall(b"bulk %d\n" % count)
        # MSG_TRUNC: the kernel throws the bytes away uncopied, so that the receiver costs little.
        while got < count and (n := s.recv_into(room, 0, socket.MSG_TRUNC)):
            got += n
    if got != count:
        sys.exit(f"{got} of {count} bytes")
    return {"gbit": count * 8e-9 / (time.monotonic() - begin)}


def round_trips(address, port, count):
    times = []
    with connect(address, port) as s:
        s.sendall(b"echo\n")
        for _ in range(count):
            begin, got = time.monotonic(), 0
            s.sendall(bytes(64))
            while got < 64:
                got += len(s.recv(64))
            times.append(time.monotonic() - begin)
    return {"us": statistics.median(times) * 1e6}


def connects(address, port, count):
    times = []
    for _ in range(count):
        begin = time.monotonic()
        with connect(address, port) as s:
            s.sendall(b"echo\nx")
            s.recv(1)
            times.append(time.monotonic() - begin)
    return {"us": statistics.median(times) * 1e6}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    room = bytearray(1 << 20)
    if what == "serve":
        serve(int(rest[0]))
    else:
        print(json.dumps({"bulk": bulk, "rtt": round_trips, "connect": connects}[what](rest[0], int(rest[1]), int(rest[2]))))
