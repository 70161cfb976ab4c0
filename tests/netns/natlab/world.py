"""An internet with sites behind NATs, in network namespaces.

    client ┐                        ┌ relay, dns: public hosts
    web    ┴ gateway ─ router(NAT) ─┤
                                   inet (the core: it routes, so that TTL falls and multicast stays at home)

The gateway runs the product and does no NAT of its own: the router upstream of it does, and knows the way to its LAN.
"""
import contextlib
import os
import subprocess
import tempfile
import threading
import time

from . import kernel, links, undo
from .kernel import LabError
from .nat import DOUBLE, Nat

# Globally routable in appearance, since a product may rightly refuse documentation or benchmark ranges as candidates.
PUBLIC = "11"
DEFAULTS = {
    "net/ipv4/ip_forward": 1, "net/ipv4/conf/all/rp_filter": 0, "net/ipv4/conf/default/rp_filter": 0,
    "net/ipv4/conf/all/send_redirects": 0, "net/ipv4/conf/default/send_redirects": 0,
    "net/ipv6/conf/default/accept_dad": 0, "net/ipv6/conf/default/accept_ra": 0,
    "net/ipv4/ping_group_range": "0 2147483647",
    # A bridge that calls iptables would do the routers' NAT inside itself.
    "net/bridge/bridge-nf-call-iptables": 0, "net/bridge/bridge-nf-call-ip6tables": 0,
}


class Process:
    """A daemon in a namespace. It is ended by its pid, and only while that is still the same process."""

    def __init__(self, lab, argv, log, env=None):
        self.log = log
        with open(log, "ab") as out:
            self.popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env,
                                          start_new_session=True)
        self.pid = self.popen.pid
        self.start = kernel.started_at(self.pid)
        lab.ledger.note("processes", [self.pid, self.start])

    def alive(self):
        return self.popen.poll() is None

    def end(self, patience=5.0):
        kernel.end_process(self.pid, self.start, patience)
        return self.wait(1)

    def signal(self, signum):
        self.popen.send_signal(signum)

    def wait(self, timeout=10.0):
        """The exit code; None if it did not end in time."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def rss(self):
        return kernel.rss_bytes(self.pid)

    def held(self):
        return kernel.held_bytes(self.pid)

    def text(self):
        with open(self.log, encoding="utf-8", errors="replace") as f:
            return f.read()


class Node:
    """One namespace: a host, a gateway or a router."""

    def __init__(self, lab, name):
        self.lab, self.name, self.ns = lab, name, f"{lab.prefix}-{name}"
        self.address = None  # its own towards the internet
        self.link = None     # its uplink
        lab.ledger.note("namespaces", self.ns)
        kernel.run(["ip", "netns", "add", self.ns])
        kernel.sysctl(self.ns, DEFAULTS)
        kernel.ip(self.ns, "link set lo up")
        lab.nodes[name] = self

    def ip(self, *lines):
        kernel.ip(self.ns, *lines)

    def run(self, *argv, check=True, stdin=None, timeout=60):
        return kernel.run(["ip", "netns", "exec", self.ns, *argv], stdin, check, timeout)

    def spawn(self, *argv, log=None, env=None):
        log = log or f"{self.lab.folder}/{self.name}-{os.path.basename(argv[0])}.log"
        return Process(self.lab, ["ip", "netns", "exec", self.ns, *argv], log, env)

    def udp(self, address="0.0.0.0", port=0, timeout=1.0):
        return kernel.udp(self.ns, address, port, timeout)

    def tcp(self, address, port, timeout=10.0, source=None):
        return kernel.tcp(self.ns, address, port, timeout, source)

    def listen(self, port=0, address="0.0.0.0"):
        return kernel.tcp_listener(self.ns, address, port)

    def resolver(self, *addresses, search=()):
        """resolv.conf of programs started here; nsswitch too, or a host's resolved would be asked instead."""
        folder = f"{undo.NETNS_CONF}/{self.ns}"
        self.lab.ledger.note("folders", folder)
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/resolv.conf", "w", encoding="ascii") as f:
            f.writelines(f"nameserver {a}\n" for a in addresses)
            # Of pods: kubelet writes search domains and ndots:5.
            f.write(f"search {' '.join(search)}\noptions ndots:5\n" if search else "")
            f.write("options timeout:2 attempts:2\n")
        if os.path.exists("/etc/nsswitch.conf"):
            with open(f"{folder}/nsswitch.conf", "w", encoding="ascii") as f:
                f.write("hosts: files dns\n")

    def meter(self, **remotes):
        """Starts counting UDP to and from these addresses on the uplink; `metered` reads. The evidence for a path."""
        rules = {"in": [], "out": []}
        counters = ""
        for label, address in remotes.items():
            for way, field in (("in", "saddr"), ("out", "daddr")):
                counters += f" counter {way}_{label} {{ }}\n"
                device = "iifname" if way == "in" else "oifname"
                rules[way].append(f'{device} "{self.link.child_dev}" ip {field} {address} meta l4proto udp'
                                  f" counter name {way}_{label}")
        kernel.nft(self.ns, "table ip tally\ndelete table ip tally\ntable ip tally {\n" + counters
                   + " chain i { type filter hook prerouting priority raw;\n" + "\n".join(rules["in"]) + "\n }\n"
                   + " chain o { type filter hook postrouting priority srcnat + 90;\n" + "\n".join(rules["out"]) + "\n }\n}\n")

    def metered(self):
        """{"in_relay": (packets, bytes), …}"""
        found = kernel.nft_json(self.ns, "list", "counters", "table", "ip", "tally")
        return {c["counter"]["name"]: (c["counter"]["packets"], c["counter"]["bytes"]) for c in found if "counter" in c}


class Router(Node):
    """Between `wan` and the bridge `in`; `nat` is None where it only routes."""

    def __init__(self, lab, name, inside, nat_kind, parent=None, hairpin=False, keep_ports=True, idle=120):
        super().__init__(lab, name)
        self.inside, self.used, self.parent = inside, 1, parent
        self.ip("link add in type bridge", f"addr add {inside}.1/24 dev in", "link set in up")
        lab.uplink(self, parent)
        if nat_kind == "none":
            self.nat = None
            lab.core.ip(f"route add {inside}.0/24 via {self.address}")
        else:
            self.nat = Nat(nat_kind, self.address, f"{inside}.0/24", hairpin, keep_ports, idle=idle)
            kernel.sysctl(self.ns, {"net/netfilter/nf_conntrack_udp_timeout": idle,
                                    "net/netfilter/nf_conntrack_udp_timeout_stream": idle})
            kernel.nft(self.ns, self.nat.rules())

    def take(self):
        """The next free address inside."""
        self.used += 1
        return f"{self.inside}.{self.used}"

    def rebind(self, address=True, ports=True):
        """What a provider's reconnect does: another public address, other public ports, or both."""
        if self.nat is None:
            raise LabError(f"{self.name} does no NAT")
        if address:
            prefix, last = self.address.rsplit(".", 1)
            fresh = f"{prefix}.{int(last) % 200 + 20}"
            self.ip(f"addr del {self.address}/24 dev wan", f"addr add {fresh}/24 dev wan",
                    f"route replace default via {self.link.parent_address} dev wan")
            self.address = self.nat.address = fresh
        self.nat.generation += ports
        kernel.nft(self.ns, self.nat.rules())
        self.forget()

    def forget(self):
        """All mappings are lost, as after a restart of the router."""
        kernel.nft(self.ns, "flush map ip isp inside\nflush set ip isp spoken")
        kernel.flush_conntrack(self.ns)


class Site:
    """Routers, a gateway, and a LAN behind it."""

    def __init__(self, name, routers, gateway, lan):
        self.name, self.routers, self.gateway, self.lan = name, routers, gateway, lan
        self.hosts = {}

    @property
    def router(self):
        """The one that touches the internet."""
        return self.routers[0]

    @property
    def client(self):
        return self.hosts["client"]

    @property
    def web(self):
        return self.hosts["web"]


class Lab:
    """Use as a context: leaving it removes everything."""

    def __init__(self, kept=False):
        if os.geteuid():
            raise LabError("network namespaces need root")
        self.ledger = undo.Ledger(kept)
        self.prefix = self.ledger.prefix
        self.nodes, self.sites, self.count = {}, {}, 0
        self.severed, self.lock = set(), threading.Lock()
        self.folder = f"{tempfile.gettempdir()}/weft-lab-{self.prefix}"
        self.ledger.note("folders", self.folder)
        os.mkdir(self.folder, 0o700)
        self.core = Node(self, "inet")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.ledger.undo()

    def host(self, name):
        """A public host without any NAT."""
        node = Node(self, name)
        self.uplink(node, None)
        return node

    def site(self, name, nat="port-restricted", hosts=("client", "web"), lan=None, behind=None, outer="port-restricted",
             inner="port-restricted", **nat_options):
        """`nat` is a kind or `double`. `behind`: another site, whose router this one's gateway shares."""
        if behind:
            routers = behind.routers
        elif nat == DOUBLE:
            carrier = Router(self, f"{name}-cgn", f"100.64.{self.number()}", outer, **nat_options)
            routers = [carrier, Router(self, f"{name}-nat", f"172.16.{self.number()}", inner, parent=carrier)]
        else:
            index = self.number()
            inside = f"{PUBLIC}.{index}.1" if nat == "none" else f"172.16.{index}"
            routers = [Router(self, f"{name}-nat", inside, nat, **nat_options)]
        gateway = Node(self, f"{name}-gw")
        self.uplink(gateway, routers[-1])
        site = Site(name, routers, gateway, lan or f"192.168.{self.number()}")
        gateway.ip("link add lan type bridge", f"addr add {site.lan}.1/24 dev lan", "link set lan up")
        if not behind and lan is None:
            # A LAN with a prefix of the caller's choice may clash with another site's: only the gateway knows it.
            routers[-1].ip(f"route add {site.lan}.0/24 via {gateway.address}")
        for last, role in enumerate(hosts, 10):
            host = Node(self, f"{name}-{role}")
            host.link = links.Link(host, "eth0", gateway, f"p-{role}"[:15], f"{site.lan}.1")
            host.address = f"{site.lan}.{last}"
            gateway.ip(f"link set {host.link.parent_dev} master lan")
            host.ip(f"addr add {host.address}/24 dev eth0", f"route add default via {site.lan}.1")
            site.hosts[role] = host
        self.sites[name] = site
        return site

    def sever(self, one, other):
        """Nothing passes between these public addresses any more, either way, and nobody is told; what goes by a third
        host does."""
        with self.lock:
            self.severed |= {(one, other), (other, one)}
            self._cut()

    def join(self, one, other):
        """Undoes `sever`."""
        with self.lock:
            self.severed -= {(one, other), (other, one)}
            self._cut()

    def _cut(self):
        elements = ", ".join(f"{a} . {b}" for a, b in sorted(self.severed))
        kernel.nft(self.core.ns, "table ip cut\ndelete table ip cut\n" + (
            f"table ip cut {{\n set pairs {{ type ipv4_addr . ipv4_addr; elements = {{ {elements} }}; }}\n"
            " chain c { type filter hook forward priority 0; ip saddr . ip daddr @pairs drop; }\n}\n" if elements else ""))

    def number(self):
        self.count += 1
        if self.count > 250:
            raise LabError("a lab has 250 networks at most")
        return self.count

    def uplink(self, node, parent):
        """Joins a node to the core, or to the inside of the router `parent`."""
        device = "eth0" if type(node) is Node and parent is None else "wan"
        if parent is None:
            prefix = f"{PUBLIC}.{self.number()}.0"
            node.address = f"{prefix}.1"
            node.link = links.Link(node, device, self.core, f"to-{node.name}"[:15], f"{prefix}.254")
            self.core.ip(f"addr add {prefix}.254/24 dev {node.link.parent_dev}")
        else:
            node.address = parent.take()
            node.link = links.Link(node, device, parent, f"p-{node.name}"[:15], f"{parent.inside}.1")
            parent.ip(f"link set {node.link.parent_dev} master in")
        node.ip(f"addr add {node.address}/24 dev {device}",
                f"route add default via {node.link.parent_address} dev {device}")


def wait_for(check, timeout=10.0, every=0.05, what=""):
    """What `check` returns once it is true; raises after `timeout`, naming `what` (a text, or what gives one then)."""
    until = time.monotonic() + timeout
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > until:
            raise TimeoutError(f"not within {timeout:g} s: {what() if callable(what) else what or check}")
        time.sleep(every)


@contextlib.contextmanager
def timed():
    """`with timed() as t: …`; then t() is the seconds it took."""
    begin = time.monotonic()
    spent = []
    yield lambda: spent[0] if spent else time.monotonic() - begin
    spent.append(time.monotonic() - begin)
