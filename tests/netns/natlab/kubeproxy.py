"""kube-proxy's rules for a few Services, in the shapes and with the names that version 1.36 gives them (pkg/proxy/iptables and
pkg/proxy/nftables; without nfacct and IPv6), and what its `--cleanup` does with them."""
import base64
import hashlib

FORWARDED = "kubernetes forwarding rules"
# table: [(built-in chain, rule)], the last one first: each is put at the head.
JUMPS = {
    "nat": [("PREROUTING", '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES'),
            ("OUTPUT", '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES'),
            ("POSTROUTING", '-m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING')],
    "filter": [("INPUT", '-m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES'),
               ("FORWARD", '-m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES'),
               ("FORWARD", f'-m comment --comment "{FORWARDED}" -j KUBE-FORWARD'),
               ("OUTPUT", '-m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES'),
               ("INPUT", "-j KUBE-FIREWALL"), ("OUTPUT", "-j KUBE-FIREWALL")]}
CHAINS = {"nat": ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-PROXY-CANARY"],
          "filter": ["KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-FORWARD", "KUBE-FIREWALL", "KUBE-PROXY-CANARY"]}


def short(text, length=16):
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:length]


class Port:
    """A Service's port with its endpoints."""

    def __init__(self, items, port):
        meta, spec = items[0]["metadata"], items[0]["spec"]
        self.namespace, self.service, self.port_name = meta["namespace"], meta["name"], port["name"]
        self.name = f"{self.namespace}/{self.service}:{self.port_name}"
        self.ip, self.number, self.protocol, self.node_port = spec["clusterIP"], port["port"], port["protocol"].lower(), port.get("nodePort")
        self.endpoints = [(e["addresses"][0], p["port"]) for item in items[1:] for e in item["endpoints"] for p in item["ports"]
                          if p["name"] == port["name"] and e["conditions"].get("ready", True)]


class Written:
    """Of one node. `mode`: iptables-nft, iptables-legacy or nftables."""

    def __init__(self, kube, node, mode, pods):
        self.node, self.mode, self.pods = node, mode, pods
        self.ports = [Port(items, p) for items in kube.items.values() for p in items[0]["spec"]["ports"]]

    def load(self):
        if self.mode == "nftables":
            self.node.run("nft", "-f", "-", stdin=f"table ip kube-proxy\ndelete table ip kube-proxy\n{self.nftables()}")
        else:
            self.remove()
            self.node.run(f"{self.mode}-restore", "--noflush", stdin=self.iptables())

    def remove(self):
        """Jumps first, then the chains: nothing else that is in those tables is touched."""
        if self.mode == "nftables":
            return self.node.run("nft", "delete", "table", "ip", "kube-proxy", check=False)
        text, table = "", ""
        jumps, chains = [], []
        for line in self.node.run(f"{self.mode}-save").splitlines():
            if line.startswith("*"):
                table, jumps, chains = line, [], []
            elif line.startswith(":KUBE-"):
                chains.append(line.split()[0][1:])
            elif line.startswith("-A ") and not line.startswith("-A KUBE-") and "-j KUBE-" in line:
                jumps.append(f"-D{line[2:]}")
            elif line == "COMMIT" and chains:
                text += "\n".join([table, *(f":{c} - [0:0]" for c in chains), *jumps, *(f"-X {c}" for c in chains), line, ""])
        return self.node.run(f"{self.mode}-restore", "--noflush", stdin=text)

    # ---- pkg/proxy/iptables

    def iptables(self):
        nat, filtered, chains = [], [], list(CHAINS["nat"])
        for p in self.ports:
            m = f"-p {p.protocol} -m comment --comment"
            match = f"-m {p.protocol} --dport"
            if not p.endpoints:
                filtered.append(f'-A KUBE-SERVICES -d {p.ip}/32 {m} "{p.name} has no endpoints" {match} {p.number} -j REJECT --reject-with icmp-port-unreachable')
                continue
            hashed = short(p.name + p.protocol)
            svc, ext = f"KUBE-SVC-{hashed}", f"KUBE-EXT-{hashed}"
            chains.append(svc)
            nat.append(f'-A KUBE-SERVICES -d {p.ip}/32 {m} "{p.name} cluster IP" {match} {p.number} -j {svc}')
            nat.append(f'-A {svc} ! -s {self.pods} -d {p.ip}/32 {m} "{p.name} cluster IP" {match} {p.number} -j KUBE-MARK-MASQ')
            if p.node_port:
                chains.append(ext)
                nat += [f'-A KUBE-NODEPORTS {m} "{p.name}" {match} {p.node_port} -j {ext}',
                        f'-A {ext} -m comment --comment "masquerade traffic for {p.name} external destinations" -j KUBE-MARK-MASQ', f"-A {ext} -j {svc}"]
            for left, (address, port) in zip(range(len(p.endpoints), 0, -1), p.endpoints):
                sep = f"KUBE-SEP-{short(f'{p.name}{p.protocol}{address}:{port}')}"
                chains.append(sep)
                chance = f" -m statistic --mode random --probability {1 / left:.11f}" if left > 1 else ""
                nat += [f'-A {svc} -m comment --comment "{p.name} -> {address}:{port}"{chance} -j {sep}',
                        f'-A {sep} -s {address}/32 -m comment --comment "{p.name}" -j KUBE-MARK-MASQ',
                        f'-A {sep} {m} "{p.name}" -m {p.protocol} -j DNAT --to-destination {address}:{port}']
        nat += ['-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
                " -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
                "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000", "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
                "-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0",
                '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully']
        filtered += ['-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections"'
                     " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP", "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
                     f'-A KUBE-FORWARD -m comment --comment "{FORWARDED}" -m mark --mark 0x4000/0x4000 -j ACCEPT',
                     '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT']
        out = []
        for table, names, rules in (("nat", chains, nat), ("filter", CHAINS["filter"], filtered)):
            out += [f"*{table}", *(f":{c} - [0:0]" for c in names), *(f"-I {chain} {rule}" for chain, rule in JUMPS[table]), *rules, "COMMIT"]
        return "\n".join(out) + "\n"

    # ---- pkg/proxy/nftables

    def nftables(self):
        served = [p for p in self.ports if p.endpoints]
        def chain(p, kind="service"):
            name = f"{p.namespace}/{p.service}/{p.protocol}/{p.port_name}"
            return f"{kind}-{short(name, 8)}-{name}"
        def elements(those):
            return f"elements = {{ {', '.join(those)} }}" if those else ""
        ips = elements([f"{p.ip} . {p.protocol} . {p.number} : goto {chain(p)}" for p in served])
        none = elements([f"{p.ip} . {p.protocol} . {p.number} : goto reject-chain" for p in self.ports if not p.endpoints])
        node_ports = elements([f"{p.protocol} . {p.node_port} : goto {chain(p, 'external')}" for p in served if p.node_port])
        hairpins = elements([f"{a} . {a} . {p.protocol} . {n}" for p in served for a, n in p.endpoints if a.rsplit(".", 1)[0] == self.own_pods()])
        chains = ""
        for p in served:
            to = ", ".join(f"{i} : {address} . {port}" for i, (address, port) in enumerate(p.endpoints))
            chains += f"chain {chain(p)} {{ meta l4proto {p.protocol} dnat ip to numgen random mod {len(p.endpoints)} map {{ {to} }}; }}\n"
            if p.node_port:
                chains += f'chain {chain(p, "external")} {{ meta mark set meta mark | 0x4000 comment "masquerade"; goto {chain(p)}; }}\n'
        return f"""table ip kube-proxy {{
            comment "rules for kube-proxy"
            set hairpin-connections {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; {hairpins} }}
            set cluster-ips {{ type ipv4_addr; {elements(sorted({p.ip for p in self.ports}))} }}
            set nodeport-ips {{ type ipv4_addr; elements = {{ {self.node.address} }} }}
            map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; {none} }}
            map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
            map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
            map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; {ips} }}
            map service-nodeports {{ type inet_proto . inet_service : verdict; {node_ports} }}
            chain reject-chain {{ reject; }}
            {chains}
            chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
            chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
            chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
            chain cluster-ips-check {{
                ip daddr @cluster-ips reject
                ip daddr 10.96.0.0/16 drop
            }}
            chain services {{
                ip daddr @cluster-ips ip saddr != {self.pods} meta mark set meta mark | 0x4000
                ip daddr . meta l4proto . th dport vmap @service-ips
                ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
            }}
            chain masquerading {{
                meta mark & 0x4000 != 0 meta mark set meta mark ^ 0x4000 masquerade fully-random
                ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
            }}
            chain filter-prerouting-pre-dnat {{ type filter hook prerouting priority dstnat - 10; ct state new jump firewall-check; }}
            chain filter-output-pre-dnat {{ type filter hook output priority -110; ct state new jump firewall-check; }}
            chain filter-input {{
                type filter hook input priority filter;
                ct state new jump nodeport-endpoints-check
                ct state new jump service-endpoints-check
            }}
            chain filter-forward {{
                type filter hook forward priority filter;
                ct state new jump service-endpoints-check
                ct state new jump cluster-ips-check
            }}
            chain filter-output {{
                type filter hook output priority filter;
                ct state new jump service-endpoints-check
                ct state new jump cluster-ips-check
            }}
            chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
            chain nat-output {{ type nat hook output priority -100; jump services; }}
            chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}
        }}
        """

    def own_pods(self):
        """The first three numbers of this node's pods' addresses: 10.244.N, as the node's name ends."""
        return f"{self.pods.rsplit('.', 2)[0]}.{1 if self.node.name.endswith('client') else 2}"
