"""IPv6 beside a lab's IPv4: a /64 for each link, no NAT, and at a site's router a firewall that keeps state."""
from . import kernel

_WALL = """table ip6 guard
delete table ip6 guard
table ip6 guard {
 chain f { type filter hook forward priority 0; policy drop;
  ct state established,related accept
  iifname "in" accept
 }
 chain i { type filter hook input priority 0;
  ct state established,related accept
  iifname "wan" meta l4proto { tcp, udp } drop
 }
}
"""


def _forwards(node):
    kernel.sysctl(node.ns, {"net/ipv6/conf/all/forwarding": 1})


class Prefixes:
    """The networks of one lab."""

    def __init__(self, lab):
        self.lab, self.count, self.of = lab, 0, {}
        _forwards(lab.core)

    def _next(self):
        self.count += 1
        return f"2a0f:ff:{self.count:x}"

    def host(self, node):
        """A public host's address."""
        prefix = self._next()
        self._to_core(node, prefix, "eth0")
        return f"{prefix}::1"

    def _to_core(self, node, prefix, device):
        self.lab.core.ip(f"addr add {prefix}::fe/64 dev {node.link.parent_dev}")
        node.ip(f"addr add {prefix}::1/64 dev {device}", f"route add default via {prefix}::fe dev {device}")

    def site(self, site):
        """The gateway's address; nothing new comes in through the router."""
        prefix, router = self._next(), site.router
        _forwards(router)
        self._to_core(router, prefix, "wan")
        self.lab.core.ip(f"route add {prefix}:1::/64 via {prefix}::1")
        router.ip(f"addr add {prefix}:1::1/64 dev in")
        kernel.nft(router.ns, _WALL)
        site.gateway.ip(f"addr add {prefix}:1::2/64 dev wan", f"route add default via {prefix}:1::1 dev wan")
        return f"{prefix}:1::2"

    def sever(self, one, other):
        """Nothing passes between these addresses any more."""
        kernel.nft(self.lab.core.ns, "table ip6 cut {\n chain c { type filter hook forward priority 0;"
                   f" ip6 saddr {one} ip6 daddr {other} drop; ip6 saddr {other} ip6 daddr {one} drop;\n }}\n}}\n")


def meter(node, device, peer):
    """Starts counting UDP with this address on the device; `metered` reads bytes (in, out)."""
    kernel.nft(node.ns, "table ip6 tally\ndelete table ip6 tally\ntable ip6 tally {\n counter came { }\n counter went { }\n"
               f' chain i {{ type filter hook prerouting priority raw; iifname "{device}" ip6 saddr {peer} meta l4proto udp counter name came; }}\n'
               f' chain o {{ type filter hook postrouting priority srcnat; oifname "{device}" ip6 daddr {peer} meta l4proto udp counter name went; }}\n}}\n')


def metered(node):
    found = kernel.nft_json(node.ns, "list", "counters", "table", "ip6", "tally")
    counters = {c["counter"]["name"]: c["counter"]["bytes"] for c in found if "counter" in c}
    return counters["came"], counters["went"]
