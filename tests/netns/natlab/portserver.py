"""A router that gives out ports: PCP's MAP (RFC 6887) and NAT-PMP (RFC 6886) for UDP, and nothing else of them."""
import contextlib
import ipaddress
import struct
import threading
import time

from . import kernel

PORT = 5351
FIRST = 41000
_BASE = """table ip pcp
delete table ip pcp
table ip pcp {
 map inward { type inet_service : ipv4_addr . inet_service; }
 map outward { type ipv4_addr . inet_service : inet_service; }
 chain pre { type nat hook prerouting priority dstnat - 5; iifname "wan" meta l4proto udp dnat ip to udp dport map @inward; }
 chain post { type nat hook postrouting priority srcnat - 5; oifname "wan" meta l4proto udp masquerade to :ip saddr . udp sport map @outward; }
}
"""


class PortServer:
    """`speaks`: pcp, natpmp, or silent. `asked` holds the requests, `open` the ports that are given out."""

    def __init__(self, router, speaks):
        self.router, self.speaks, self.asked, self.open = router, speaks, [], {}
        self.began, self.next, self.ending = time.monotonic(), FIRST, False
        kernel.nft(router.ns, _BASE)
        self.socket = router.udp(f"{router.inside}.1", PORT, timeout=0.2)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self):
        self.ending = True
        self.thread.join(2)
        self.socket.close()

    def _serve(self):
        while not self.ending:
            with contextlib.suppress(TimeoutError):
                data, source = self.socket.recvfrom(1100)
                self.asked.append(data)
                answer = self._answer(data, source[0])
                if answer:
                    self.socket.sendto(answer, source)

    def _answer(self, data, host):
        epoch = int(time.monotonic() - self.began) + 1
        if self.speaks == "silent":
            return None
        if data[0] == 2 and self.speaks == "natpmp":
            return struct.pack(">BBHI", 0, 128 | data[1], 1, epoch)
        if data[0] == 2 and len(data) >= 60:
            lifetime, = struct.unpack_from(">I", data, 4)
            client = str(ipaddress.ip_address(data[8:24]).ipv4_mapped)
            port, _ = struct.unpack_from(">HH", data, 40)
            code = 0 if client == host and data[36] == 17 else 12  # ADDRESS_MISMATCH
            outside = self._give(host, port, lifetime) if code == 0 else 0
            return (struct.pack(">BBBBII12x", 2, 0x81, 0, code, lifetime, epoch) + data[24:42] + struct.pack(">H", outside)
                    + ipaddress.ip_address(f"::ffff:{self.router.address}").packed)
        if data[:2] == b"\0\0":
            return struct.pack(">BBHI4s", 0, 128, 0, epoch, ipaddress.ip_address(self.router.address).packed)
        if data[:2] == b"\0\1" and len(data) == 12:
            port, _, lifetime = struct.unpack_from(">HHI", data, 4)
            return struct.pack(">BBHIHHI", 0, 129, 0, epoch, port, self._give(host, port, lifetime), lifetime)
        return None

    def _give(self, host, port, lifetime):
        """RFC 6887 section 11: what leaves from the inner port has the outer one too."""
        if lifetime == 0:
            outside = self.open.pop((host, port), 0)
            if outside:
                kernel.nft(self.router.ns, f"delete element ip pcp inward {{ {outside} }}\n"
                           f"delete element ip pcp outward {{ {host} . {port} }}\n")
            return 0
        if (host, port) not in self.open:
            outside, self.next = self.next, self.next + 1
            self.open[host, port] = outside
            kernel.nft(self.router.ns, f"add element ip pcp inward {{ {outside} : {host} . {port} }}\n"
                       f"add element ip pcp outward {{ {host} . {port} : {outside} }}\n")
        return self.open[host, port]
