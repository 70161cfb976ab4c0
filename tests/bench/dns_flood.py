"""Queries and garbage at a steady rate to one server, whatever it answers.

usage: dns_flood.py ADDRESS PORT RATE SECONDS [PERCENT OF GARBAGE]"""
import contextlib
import random
import socket
import struct
import sys
import time

MANY, BURST = 65536, 20


def query(name, ident):
    labels = b"".join(bytes([len(x)]) + x.encode() for x in name.split("."))
    return struct.pack(">HHHHHH", ident, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def main():
    address, port, rate, seconds, *garbage = sys.argv[1:]
    rng = random.Random(11)
    percent = int(garbage[0]) if garbage else 30
    messages = [rng.randbytes(rng.randrange(1, 300)) if rng.randrange(100) < percent
                else query(f"{rng.getrandbits(64):x}.foreign.example", i) for i in range(MANY)]
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    own.connect((address, int(port)))
    own.setblocking(False)
    begin, sent, answers = time.monotonic(), 0, 0
    while (now := time.monotonic() - begin) < float(seconds):
        while sent < now * int(rate):
            for message in (messages[(sent + i) % MANY] for i in range(BURST)):
                with contextlib.suppress(OSError):
                    own.send(message)
            sent += BURST
        with contextlib.suppress(OSError):
            while own.recv(2048):
                answers += 1
        time.sleep(0.001)
    print(f"{sent} sent, {answers} answered, {sent / (time.monotonic() - begin):.0f} a second")


if __name__ == "__main__":
    main()
