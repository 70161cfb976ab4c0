"""A: the types of Services."""
import os
import socket
import threading
import time

from natlab import wait_for
from report import expect
from stage import read_all, refused

from .world import eq, from_all, ports, rules, seen


def both_names(w, node):
    got = seen(w, "10.96.1.1", node=node)
    expect(set(got) == {"a", "b"} and len(got) == 20, got)
    return "20 of 20"


def udp_answers(w, node):
    got = {w.datagram("10.96.1.4", node=node) for _ in range(8)}  # a connected socket takes no other source
    expect(got <= {b"a:ping", b"b:ping"} and got, got)
    return len(got)


def udp_far(w):
    got = {w.datagram("10.96.2.4", node=node, timeout=8) for node in w.clients().values()}
    expect(got == {b"far:ping"}, got)
    return "through the tunnel"


def rows_a(w, case):
    case(1, "clusterip-tcp.pod", lambda: both_names(w, w.one.client))
    case(2, "clusterip-tcp.node", lambda: both_names(w, w.one.gateway))
    case(3, "clusterip-tcp.backend", lambda: both_names(w, w.one.web))
    case(4, "clusterip-udp", lambda: from_all(udp_answers)(w))
    case(4, "clusterip-udp.far", lambda: udp_far(w))
    case(5, "sctp-is-skipped", lambda: eq((w.ask("10.96.1.5"), w.datagram("10.96.1.5")), ("a", b"a:ping")))
    case(6, "several-ports", lambda: eq((w.ask("10.96.1.6"), w.ask("10.96.1.6", 81)), ("a", "a2")))
    case(7, "one-number-two-protocols", lambda: eq((w.ask("10.96.1.7"), w.datagram("10.96.1.7", 80)), ("a", b"a:ping")))
    case(8, "named-target-ports", lambda: eq(set(seen(w, "10.96.1.8")), {"a", "b2"}))

    def two_of_one_selector():
        eq((w.ask("10.96.1.9"), w.ask("10.96.2.9")), ("a", "a"))
        del w.kube.items["r9"]
        w.kube.write()
        wait_for(lambda: w.tries(w.ask, "10.96.1.9", timeout=1) is None, 10, what="one of them is gone")
        eq(w.ask("10.96.2.9"), "a")
    case(9, "two-services-one-selector", two_of_one_selector)

    one = w.one
    inside, uplink = one.gateway.link and f"{one.lan}.1", one.gateway.address
    def node_port(ask, want):
        for where, address, node in (("LAN", inside, one.client), ("uplink", uplink, w.outside()), ("uplink from inside", uplink, one.client),
                                     ("node", inside, one.gateway), ("node, uplink", uplink, one.gateway), ("backend", inside, one.web)):
            got = {ask(address, 30010, node) for _ in range(8)}
            expect(got == want, f"{where}: got {got!r}, want {want!r}")
        return "LAN, uplink, node, backend"
    case(10, "node-port-tcp", lambda: node_port(w.ask, {"a", "b"}))
    case(11, "node-port-udp", lambda: node_port(w.datagram, {b"a:ping", b"b:ping"}))
    case(12, "one-node-port-two-protocols", lambda: expect(
        w.ask(inside, 30012) in "ab" and w.datagram(inside, 30012) in (b"a:ping", b"b:ping"), "no"))

    def selected():
        """The far node serves NodePorts on its LAN's address alone; through the tunnel, where its neighbours are near."""
        two = w.two
        eq(w.ask(f"{two.lan}.1", 30062, two.client), "far")
        for node in (w.outside(two), two.client):
            refused(node, two.gateway.address, 30062)
    case(13, "node-ports-on-selected-addresses", selected)
    case(14, "node-ports-not-on-127.0.0.1", lambda: refused(one.gateway, "127.0.0.1", 30010))

    def external(node):
        eq((w.ask("203.0.113.15", 80, node), w.datagram("203.0.113.15", 53, node)), ("a", b"a:ping"))
        return "TCP and UDP"
    case(15, "external-ips", lambda: from_all(lambda w, node: external(node))(w))
    case(15, "external-ips.only-when-asked", lambda: expect("203.0.113.1" not in rules(w, w.two.gateway), "a rule on the other node"))
    case(16, "load-balancer-ingress", lambda: eq({w.ask("203.0.113.16", 80, n) for n in w.clients().values()}, {"a"}))

    def left_alone(number, why):
        expect(f"203.0.113.{number}" not in rules(w), why)
        eq(w.ask(f"10.96.1.{number}"), "a")
    case(17, "ingress-of-mode-proxy", lambda: left_alone(17, "a rule for what the load balancer must see itself"))
    case(18, "ingress-with-a-hostname", lambda: left_alone(18, "a rule"))
    case(20, "external-name", lambda: eq(w.tries(w.ask, "10.96.1.20", timeout=1), None))
    case(21, "headless", lambda: expect("10.96.1.21" not in rules(w), "a rule"))
    def no_address_yet():
        w.kube.service("r22", "10.96.1.22", ports("80/TCP:8080"), [w.a])
        w.kube.write()
        wait_for(lambda: w.tries(w.ask, "10.96.1.22", timeout=1) == "a", 10, what="it has an address now")
    case(22, "without-address", no_address_yet)
    def api_server():
        """Every byte as it came, from everywhere, through hostNetwork."""
        data = os.urandom(300_000)
        for node in w.clients().values():
            with node.tcp("10.96.1.23", 443) as s:
                threading.Thread(target=lambda s=s: (s.sendall(data), s.shutdown(socket.SHUT_WR)), daemon=True).start()
                expect(read_all(s) == data, "other bytes")
    case(23, "the-service-of-the-api-server", api_server)
    case(24, "host-network", lambda: eq({w.ask("10.96.1.24", 9000, n) for n in w.clients().values()}, {"host"}))

    def large():
        with w.one.client.tcp("10.96.1.25", 7000) as s:
            s.settimeout(30)
            data = os.urandom(2 << 20)
            threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR)), daemon=True).start()
            expect(read_all(s) == data, "2 MB differ")
        for size in (8_192, 60_000):
            data = os.urandom(size)
            expect(w.datagram("10.96.1.25", data=data) == b"a:" + data, f"{size} bytes differ")
    case(25, "large", large)

    def large_far():
        for size in (1_200, 8_192, 60_000):
            data = os.urandom(size)
            expect(w.datagram("10.96.2.4", data=data) == b"far:" + data, f"{size} bytes differ")
    case(25, "large.far", large_far)

    def half_close():
        with w.one.client.tcp("10.96.1.25", 7000) as s:
            s.sendall(b"all")
            s.shutdown(socket.SHUT_WR)
            eq(read_all(s), b"all")

    def idle():
        """A silent connection is not cut, and probed towards both sides."""
        with w.one.client.tcp("10.96.1.25", 7000) as s:
            s.sendall(b"one ")
            time.sleep(6)
            timers = [line for line in w.one.gateway.run("ss", "-tnoH", "state", "established").splitlines()
                      if w.one.client.address in line or f"{w.one.web.address}:7000" in line]
            expect(len(timers) >= 2 and all("timer:(keepalive," in line for line in timers), timers)
            s.sendall(b"two")
            s.shutdown(socket.SHUT_WR)
            eq(read_all(s), b"one two")
        return f"{len(timers)} sockets with keepalive"
    case(27, "idle", idle)
    case(26, "half-close", half_close)
