"""Measures what a NAT does, by UDP sockets on both of its sides (RFC 4787's words, RFC 5780's method)."""
import contextlib
import dataclasses
import secrets
import socket
import time

PATIENCE = 0.4  # seconds until a datagram counts as lost; nothing in a lab without a shim takes a tenth of that
TRIES = 3


@dataclasses.dataclass
class Seen:
    """What was measured at one NAT."""
    mapping: str
    filtering: str
    mapped: list       # (address, port) at each observer
    keeps_port: bool

    @property
    def steps(self):
        return [b[1] - a[1] for a, b in zip(self.mapped, self.mapped[1:])]


class Observers:
    """Two public hosts with two UDP ports each."""

    def __init__(self, first, second):
        self.places = [(node.address, port) for node in (first, second) for port in (3478, 3479)]
        self.sockets = {place: node.udp(place[0], place[1], PATIENCE)
                        for node in (first, second) for place in self.places if place[0] == node.address}

    def close(self):
        for s in self.sockets.values():
            s.close()

    def see(self, client, place):
        """The address under which the observer at `place` sees the socket `client`; None if nothing arrives."""
        token = secrets.token_bytes(8)
        for _ in range(TRIES):
            with contextlib.suppress(OSError):
                client.sendto(token, place)
                return self._wait(self.sockets[place], token)
        return None

    @staticmethod
    def _wait(s, token):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            data, source = s.recvfrom(64)
            if data == token:
                return source
        raise TimeoutError

    def reaches(self, place, mapped, client):
        """Whether a datagram from the observer's socket at `place` to `mapped` comes in at `client`."""
        token = secrets.token_bytes(8)
        for _ in range(TRIES):
            with contextlib.suppress(OSError):
                self.sockets[place].sendto(token, mapped)
                self._wait(client, token)
                return True
        return False

    def classify(self, node):
        with node.udp(timeout=PATIENCE) as s:
            mapped = [self.see(s, place) for place in self.places]
            keeps = bool(mapped[0]) and mapped[0][1] == s.getsockname()[1]
        if not all(mapped):
            return Seen("blocked", "blocked", mapped, False)
        if len(set(mapped)) == 1:
            mapping = "EI"
        else:
            mapping = "AD" if mapped[0] == mapped[1] and mapped[2] == mapped[3] else "APD"
        home, same_host, other_host = self.places[0], self.places[1], self.places[2]
        with node.udp(timeout=PATIENCE) as s:
            target = self.see(s, home)
            if not self.reaches(home, target, s):
                filtering = "blocked"
            elif self.reaches(other_host, target, s):
                filtering = "EI"
            else:
                filtering = "AD" if self.reaches(same_host, target, s) else "APD"
        return Seen(mapping, filtering, mapped, keeps)

    def hairpins(self, one, other):
        """Whether `one` reaches `other` by its public address; and the source that `other` sees."""
        with one.udp(timeout=PATIENCE) as a, other.udp(timeout=PATIENCE) as b:
            self.see(a, self.places[0])
            target = self.see(b, self.places[0])
            token = secrets.token_bytes(8)
            for _ in range(TRIES):
                a.sendto(token, target)
                with contextlib.suppress(OSError):
                    return True, self._wait(b, token)
            return False, None


def one_way(sender, receiver, address, count=100, gap=0.005, size=200):
    """Sends `count` datagrams and gives (arrived, sorted milliseconds on the way). Both ends share this machine's clock."""
    with receiver.udp(address, 0, 2.0) as to, sender.udp() as s:
        port = to.getsockname()[1]
        sent, took = {}, []
        to.setblocking(False)

        def drain():
            with contextlib.suppress(BlockingIOError):
                while True:
                    data = to.recv(2048)
                    took.append((time.monotonic() - sent[data[:8]]) * 1000)

        nonces = [secrets.token_bytes(8) for _ in range(count)]
        begin = time.monotonic()
        for i, nonce in enumerate(nonces):
            sent[nonce] = time.monotonic()
            s.sendto(nonce.ljust(size, b"."), (address, port))
            while time.monotonic() < begin + (i + 1) * gap:
                drain()
                time.sleep(0.0002)
        until = time.monotonic() + 0.7
        while len(took) < count and time.monotonic() < until:
            drain()
            time.sleep(0.0002)
        return len(took), sorted(took)


def flood_rate(sender, receiver, address, megabits, seconds=1.5, size=1200):
    """Megabits a second (of IP) that arrive when `megabits` are offered."""
    with receiver.udp(address, 0, 0.4) as to, sender.udp() as s:
        port, payload = to.getsockname()[1], b"." * size
        to.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        to.setblocking(False)
        gap, arrivals = size * 8 / (megabits * 1e6), []
        begin = time.monotonic()
        sent = 0
        while (t := time.monotonic() - begin) < seconds:
            if sent * gap <= t:
                s.sendto(payload, (address, port))
                sent += 1
            with contextlib.suppress(BlockingIOError):
                to.recv(2048)
                arrivals.append(time.monotonic())
        first = begin + seconds / 3  # without the bucket's first burst
        counted = [a for a in arrivals if a > first]
        return len(counted) * (size + 28) * 8 / 1e6 / (seconds * 2 / 3)
