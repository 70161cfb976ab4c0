"""The NAT routers: one nftables rule set for each kind. RFC 4787 names what a NAT does by two words.

Mapping: which public port one inside socket gets towards different remotes.
Filtering: which remotes may send to that public port.
EI = endpoint-independent, AD = address-dependent, APD = address- and port-dependent.
"""
import dataclasses

# kind: (mapping, filtering), what the self-check must measure
KINDS = {
    "none": ("EI", "EI"),
    "full-cone": ("EI", "EI"),
    "address-restricted": ("EI", "AD"),
    "port-restricted": ("EI", "APD"),
    "address-dependent": ("AD", "APD"),
    "symmetric": ("APD", "APD"),
    "symmetric-random": ("APD", "APD"),
    "udp-blocked": ("blocked", "blocked"),
}
# A double NAT is two routers in a row: the carrier's, and the one at home behind it.
DOUBLE = "double"
STRICTNESS = ("EI", "AD", "APD", "blocked")
# Where ports are not kept they come from this many above a base: the widest map that nft still loads quickly.
SPAN = 4096


@dataclasses.dataclass
class Nat:
    """One router's NAT between `wan` (outside) and `in` (inside)."""
    kind: str
    address: str           # its public one; changes when it is rebound
    inside: str            # prefix of the network behind it
    hairpin: bool = False
    keep_ports: bool = True
    generation: int = 0    # counts rebinds; other generation, other public ports
    idle: int = 120        # seconds until an unused mapping is forgotten (RFC 4787 REQ-5: not under two minutes)

    def __post_init__(self):
        if self.kind not in KINDS or self.kind == "none":
            raise ValueError(f"no NAT of kind {self.kind!r}")
        if self.hairpin and KINDS[self.kind][0] != "EI":
            raise ValueError("hairpinning needs an endpoint-independent mapping")

    def rules(self):
        """The whole table. Linux's conntrack alone filters by address and port: whoever was not written to first is a
        new connection and is dropped. The looser kinds let new packets in through `inside`, which remembers the inside
        socket behind each public port."""
        remembers = self.hairpin or self.kind in ("full-cone", "address-restricted")
        return "\n".join([
            "table ip isp", "delete table ip isp",
            "table ip isp {",
            f" map inside {{ type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout {self.idle}s; size 65535; }}",
            f" set spoken {{ type ipv4_addr . inet_service; flags dynamic,timeout; timeout {self.idle}s; size 65535; }}",
            _chain("arrive", "nat", "prerouting", "dstnat", self._arrive()),
            _chain("leave", "nat", "postrouting", "srcnat", self._leave()),
            _chain("remember", "filter", "postrouting", "srcnat + 50", _REMEMBER if remembers else []),
            _chain("through", "filter", "forward", "filter; policy drop", self._through()),
            _chain("own", "filter", "input", "filter", self._own()),
            "}", ""])

    def _arrive(self):
        rules = []
        if self.kind == "full-cone":
            rules.append('iifname "wan" meta l4proto udp dnat ip to udp dport map @inside')
        if self.kind == "address-restricted":
            rules.append('iifname "wan" ip saddr . udp dport @spoken dnat ip to udp dport map @inside')
        if self.hairpin:
            rules.append(f'iifname "in" ip daddr {self.address} meta l4proto udp dnat ip to udp dport map @inside')
        return rules

    def _leave(self):
        out = 'oifname "wan" meta l4proto udp'
        seed = f"seed {1 + self.generation * 7919 + sum(map(ord, self.address))}"
        if self.kind == "symmetric":
            udp = f"{out} masquerade to :{_ports(f'numgen inc mod {SPAN}', 30000)}"
        elif self.kind == "symmetric-random":
            udp = f"{out} masquerade fully-random"
        elif self.kind == "address-dependent":
            udp = f"{out} masquerade to :{_ports(f'jhash ip saddr . udp sport . ip daddr mod {SPAN} {seed}', 20000)}"
        elif self.keep_ports and not self.generation:
            udp = f"{out} masquerade"
        else:
            udp = f"{out} masquerade to :{_ports(f'jhash ip saddr . udp sport mod {SPAN} {seed}', 20000)}"
        rules = [udp, 'oifname "wan" masquerade']
        if self.hairpin:
            # RFC 4787 REQ-9: the inside host sees the public source, not the private one.
            rules.append(f'oifname "in" ct status dnat ip saddr {self.inside} snat to {self.address}')
        return rules

    def _through(self):
        outward = 'iifname "in" oifname "wan"'
        return [
            "ct state established,related accept",
            "ct state invalid drop",
            f"{outward} tcp dport 443 accept" if self.kind == "udp-blocked" else f"{outward} accept",
            "ct status dnat accept",
        ]

    def _own(self):
        # Dropped before conntrack confirms it: else the stranger's entry would hold the tuple, and our own later packet
        # to that stranger would be given another port.
        return [
            "ct state established,related accept",
            'iifname "wan" meta l4proto { tcp, udp } drop',
            f"ip daddr {self.address} meta l4proto udp drop",
        ]


_REMEMBER = [
    'oifname "wan" meta l4proto udp ct direction original'
    " update @inside { udp sport : ct original ip saddr . ct original proto-src }",
    'oifname "wan" meta l4proto udp ct direction reply'
    " update @inside { udp sport : ct reply ip saddr . ct reply proto-src }",
    'oifname "wan" meta l4proto udp update @spoken { ip daddr . udp sport }',
]


def _chain(name, kind, hook, priority, rules):
    body = "".join(f"  {rule}\n" for rule in rules)
    return f" chain {name} {{\n  type {kind} hook {hook} priority {priority};\n{body} }}"


def _ports(number, base):
    """nft has no arithmetic on ports: a map from each number to its port."""
    return f"{number} map {{ {', '.join(f'{n} : {base + n}' for n in range(SPAN))} }}"


def behaviour(kinds):
    """(mapping, filtering) of NATs in a row: of each the strictest."""
    words = [KINDS[kind] for kind in kinds] or [KINDS["none"]]
    return tuple(max((w[i] for w in words), key=STRICTNESS.index) for i in (0, 1))
