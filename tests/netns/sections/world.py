"""Two sites with Services for the rows, and how they are asked."""
import contextlib
import json
import os
import shutil
import socket
import threading

from natlab import kernel, servers, wait_for, weft
from natlab.weft import Cluster
from report import expect
from stage import read_all


def ports(*specs):
    """"80/TCP:8080:name:nodePort" → a Service's ports."""
    out = []
    for spec in specs:
        front, target, name, node = (spec.split(":") + [""] * 3)[:4]
        number, protocol = front.split("/")
        out.append({"name": name, "port": int(number), "protocol": protocol, "target": int(target or number),
                    **({"nodePort": int(node)} if node else {})})
    return out


class Kube:
    """Objects as kubectl prints them, in files that both nodes read."""

    def __init__(self, paths):
        self.paths, self.items = paths, {}

    def service(self, name, ip, wanted, endpoints=(), slices=None, labels=None, **spec):
        ips = ip.split()
        spec = {"type": "ClusterIP", "clusterIP": (ips or [""])[0], "clusterIPs": ips,
                "ports": [{k: v for k, v in p.items() if k != "target"} | {"targetPort": p["target"]} for p in wanted], **spec}
        meta = {"name": name, "namespace": "rows", "labels": labels or {}}
        self.items[name] = [{"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}]
        for i, (of, those) in enumerate(slices if slices is not None else [(wanted, endpoints)]):
            self.slice(name, f"{name}-{i}", of, those)

    def slice(self, service, name, of, endpoints, family="IPv4", labels=None):
        self.items[service].append({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {"name": name, "namespace": "rows", "labels": {"kubernetes.io/service-name": service, **(labels or {})}},
            "ports": [{"name": p["name"], "port": p["target"], "protocol": p["protocol"]} for p in of],
            "endpoints": [{"addresses": [e[0]], "nodeName": e[1], "conditions": e[2] if len(e) > 2 else {"ready": True}}
                          if e[1] else {"addresses": [e[0]], "conditions": {"ready": True}} for e in endpoints]})

    def write(self):
        text = json.dumps({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""},
                           "items": [item for of in self.items.values() for item in of]})
        for path in self.paths:
            weft.write(path, text)


class Udp:
    """Answers each datagram with its name and what it got; remembers where from."""

    def __init__(self, node, port, name):
        self.socket, self.name, self.seen = node.udp("::", port, timeout=None), name.encode(), set()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                data, peer = self.socket.recvfrom(65535)
                self.seen.add(peer)
                with contextlib.suppress(OSError):  # EMSGSIZE: not our matter
                    self.socket.sendto(self.name + b":" + data if len(data) < 65000 else data, peer)


def variant(lab, kind, apart=None):
    """An environment whose iptables is that one: iptables-nft, iptables-legacy."""
    folder = f"{lab.folder}/{apart or kind}"
    if not os.path.isdir(folder):
        os.makedirs(folder)
        for tool in ("iptables-restore", "iptables-save", "iptables", "ip6tables-restore", "ip6tables-save", "ip6tables"):
            named = tool.replace("tables", f"tables-{kind.split('-')[1]}")
            # By either name, as it is asked for where legacy tables are there already.
            for name in (tool, named):
                os.symlink(shutil.which(named), f"{folder}/{name}")
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def ask(node, address, port=80, timeout=3.0):
    """What the TCP server there calls itself."""
    with node.tcp(address, port, timeout=timeout) as s:
        return read_all(s).decode().split()[0]


def datagram(node, address, port=53, data=b"ping", timeout=3.0, s=None):
    own = s or node.udp("::" if ":" in address else "0.0.0.0", timeout=timeout)
    try:
        own.connect((address, port))
        own.send(data)
        return own.recv(65535)
    finally:
        if s is None:
            own.close()


def tries(action, *args, **kw):
    """None where it fails."""
    with contextlib.suppress(OSError):
        return action(*args, **kw)
    return None


class World:
    def __init__(self, lab, backend):
        self.lab, self.backend = lab, backend
        self.cluster = Cluster(lab, ("port-restricted", "port-restricted"))
        self.one, self.two = self.cluster.sites.values()
        env = None
        if backend.startswith("iptables"):
            env = variant(lab, backend)
        kind = "iptables" if env else "nft"
        self.cluster.relay()
        self.agent = self.cluster.edge("edge-1", files=[], env=env, proxy={"backend": kind, "external_ips": True})
        # Only on the address of its LAN.
        nets = [f"{self.two.lan}.0/24"]
        self.far = self.cluster.edge("edge-2", files=[], env=env, proxy={"backend": kind, "node_ports": nets})
        self.kube = Kube([a.config["kube"]["manifests"][0] for a in (self.agent, self.far)])
        self.six = {}
        for n, site in enumerate((self.one, self.two), 1):
            kernel.sysctl(site.gateway.ns, {"net/ipv6/conf/all/forwarding": 1})
            for last, node, device in ((1, site.gateway, "lan"), (10, site.client, "eth0"), (11, site.web, "eth0")):
                self.six[node.name] = f"fd10:{n}::{last}"
                node.ip(f"addr add {self.six[node.name]}/64 dev {device}")
                if last > 1:
                    node.ip(f"route add default via fd10:{n}::1")

    def clients(self):
        """Pod, node, and a pod that is a backend."""
        return {"pod": self.one.client, "node": self.one.gateway, "backend": self.one.web}

    def outside(self, site=None):
        """The router behind a site's uplink: it comes by the interface of the default route."""
        return (site or self.one).routers[-1]

    def ask(self, address, port=80, node=None, timeout=2.0):
        return ask(node or self.one.client, address, port, timeout)

    def datagram(self, address, port=53, node=None, data=b"ping", timeout=3.0, s=None):
        return datagram(node or self.one.client, address, port, data, timeout, s)

    tries = staticmethod(tries)

    def refused_udp(self, address, port, node=None):
        try:
            self.datagram(address, port, node, timeout=1.0)
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False


def setup(w):
    one, two, kube = w.one, w.two, w.kube
    w.servers = [servers.Service(node, port, servers.says(name), "::") for node, port, name in (
        (one.web, 8080, "a"), (one.client, 8080, "b"), (one.web, 8081, "a2"), (one.client, 8000, "b2"), (one.gateway, 9000, "host"),
        (two.web, 8080, "far"), (one.web, 8090, "gone"))]
    w.udp = [Udp(one.web, 5300, "a"), Udp(one.client, 5300, "b"), Udp(two.web, 5300, "far"), Udp(one.web, 5400, "a4")]
    w.echo = servers.Service(one.web, 7000, servers.echo_at_end)
    a, b, far, host = (one.web.address, "edge-1"), (one.client.address, "edge-1"), (two.web.address, "edge-2"), \
        (one.gateway.address, "edge-1")
    w.a, w.b, w.farther, w.host = a, b, far, host
    web, dns = ports("80/TCP:8080"), ports("53/UDP:5300")
    kube.service("r1", "10.96.1.1", web, [a, b])
    kube.service("r4", "10.96.1.4", dns, [a, b])
    kube.service("r4far", "10.96.2.4", dns, [far])
    kube.service("r5", "10.96.1.5", ports("80/TCP:8080:web", "132/SCTP:132:sctp", "53/UDP:5300:dns"), [a])
    kube.service("r6", "10.96.1.6", ports("80/TCP:8080:x", "81/TCP:8081:y"), [a])
    kube.service("r7", "10.96.1.7", ports("80/TCP:8080:x", "80/UDP:5300:y"), [a])
    kube.service("r8", "10.96.1.8", web, slices=[(ports("80/TCP:8080"), [a]), (ports("80/TCP:8000"), [b])])
    for n in ("r9", "r9b"):
        kube.service(n, "10.96.1.9" if n == "r9" else "10.96.2.9", web, [a])
    for n in (10, 12):
        kube.service(f"r{n}", f"10.96.1.{n}", ports(f"80/TCP:8080:t:300{n}", f"53/UDP:5300:u:300{n}"), [a, b, far], type="NodePort")
    kube.service("r15", "10.96.1.15", ports("80/TCP:8080:t", "53/UDP:5300:u"), [a], externalIPs=["203.0.113.15"])
    ingress = {16: {"ip": "203.0.113.16"}, 17: {"ip": "203.0.113.17", "ipMode": "Proxy"}, 18: {"hostname": "lb.example"}}
    for n, one in ingress.items():
        kube.service(f"r{n}", f"10.96.1.{n}", web, [a], type="LoadBalancer")
        kube.items[f"r{n}"][0]["status"] = {"loadBalancer": {"ingress": [one]}}
    kube.service("r20", "10.96.1.20", web, [a], type="ExternalName", externalName="other.example")
    kube.service("r21", "None", web, [a])
    kube.items["r21"][0]["spec"]["clusterIPs"] = ["None"]
    kube.service("r22", "", web, [a])
    kube.service("r23", "10.96.1.23", ports("443/TCP:6443"), [host])
    w.api = servers.Service(w.one.gateway, 6443, servers.echo_at_end)
    kube.service("r87", "10.96.1.87", web, slices=[([{"name": "", "target": None, "protocol": "TCP"}], [b]), (web, [a])])
    kube.service("r87b", "10.96.2.87", web, slices=[([{"name": "", "target": None, "protocol": "TCP"}], [b])])
    kube.service("r24", "10.96.1.24", ports("9000/TCP:9000"), [host])
    kube.service("r25", "10.96.1.25", ports("7000/TCP:7000:t", "53/UDP:5300:u"), [a])
    kube.service("r29", "10.96.1.29", ports("7000/TCP:7000"), [a])
    kube.service("r36", "10.96.1.36", web, slices=[(web, [a]), (web, [a, b])])
    kube.service("r38", "10.96.1.38", web, slices=[])
    kube.items["r38"].append({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "r38", "namespace": "rows"}, "subsets": [
        {"addresses": [{"ip": a[0], "nodeName": "edge-1"}], "ports": [{"name": "", "port": 8080, "protocol": "TCP"}]}]})
    kube.service("r40", "10.96.1.40", ports("80/TCP:8080:t", "53/UDP:5300:u"), [])
    no, ending = {"ready": False}, {"ready": False, "serving": True, "terminating": True}
    kube.service("r44", "10.96.1.44", web, [a, (*b, no)])
    kube.service("r45", "10.96.1.45", web, [(*a, {"ready": True, "serving": False})])
    kube.service("r46", "10.96.1.46", web, [(*a, {})])
    kube.service("r47", "10.96.1.47", web, [(*a, ending), (*b, {"ready": False, "serving": False, "terminating": True})])
    kube.service("r47b", "10.96.2.47", web, [(*a, ending), b])
    kube.service("r49", "10.96.1.49", ports("80/TCP:8090"), [a, b])
    kube.service("r49u", "10.96.2.49", ports("53/UDP:5400"), [a, b])
    kube.service("r50", "10.96.1.50", ports("80/TCP:8090"), [a, b], sessionAffinity="ClientIP")
    for n, where in ((62, far), (63, a)):
        kube.service(f"r{n}", f"10.96.1.{n}", ports(f"80/TCP:8080:t:300{n}", f"53/UDP:5300:u:300{n}"), [where], type="NodePort",
                     externalTrafficPolicy="Local")
    kube.service("r64", "10.96.1.64", web, [far], internalTrafficPolicy="Local")
    kube.service("r64b", "10.96.2.64", web, [far, b], internalTrafficPolicy="Local")
    kube.service("r66", "10.96.1.66", ports("80/TCP:8080:t", "53/UDP:5300:u"), [a, b], sessionAffinity="ClientIP")
    kube.service("r67", "10.96.1.67", web, [a, b], sessionAffinity="ClientIP",
                 sessionAffinityConfig={"clientIP": {"timeoutSeconds": 4}})
    kube.service("r77", "10.96.1.77", web, [(a[0], None)])
    for n, label in (("78", "service.kubernetes.io/service-proxy-name"), ("81", "service.edgemesh.kubeedge.io/service-proxy-name")):
        kube.service(f"r{n}", f"10.96.1.{n}", web, [a], labels={label: "other"})
    kube.service("r79", "10.96.1.79", web, slices=[(ports("80/TCP:80"), [("10.96.1.79", "edge-1")])])
    kube.service("r80", "10.96.1.80", web, [a], labels={"service.kubernetes.io/headless": ""})
    kube.service("r84", "10.96.1.84", web, [a])
    kube.slice("r84", "r84-name", web, [("name.example", "edge-1")], family="FQDN")
    kube.slice("r84", "r85-v6", web, [("fd00::1", "edge-1")], family="IPv6")
    kube.service("r86", "10.96.1.86", web, [("127.0.0.1", "edge-1"), ("0.0.0.0", "edge-1"), a])
    kube.service("r96", "172.30.0.96", web, [a])
    a6, b6, far6 = ((w.six[node.name], edge) for node, edge in ((w.one.web, "edge-1"), (w.one.client, "edge-1"), (two.web, "edge-2")))
    w.a6, w.b6 = a6, b6
    both = ports("80/TCP:8080:t:30082", "53/UDP:5300:u:30082")
    kube.service("r82", "10.96.1.82 fd00:96::1:82", both, [a], type="NodePort")
    kube.slice("r82", "r82-6", both, [b6], family="IPv6")
    kube.service("r82b", "10.96.2.82 fd00:96::2:82", ports("80/TCP:8080:t", "53/UDP:5300:u"), [a])
    six = ports("80/TCP:8080:t:30083", "53/UDP:5300:u:30083")
    kube.service("r83", "fd00:96::1:83", six, [], slices=[], type="NodePort")
    kube.slice("r83", "r83-6", six, [a6, b6], family="IPv6")
    six = ports("80/TCP:8080:t", "53/UDP:5300:u")
    kube.service("r83far", "fd00:96::2:83 10.96.2.83", six, [], slices=[])
    kube.slice("r83far", "r83far-6", six, [far6], family="IPv6")
    kube.write()
    w.cluster.start()
    wait_for(lambda: w.tries(w.ask, "10.96.1.1") and w.tries(w.datagram, "10.96.1.4"), 20,
             what=lambda: f"the first Service works; {w.agent.tail()}")


def seen(w, address, n=20, node=None, port=80):
    return [w.ask(address, port, node) for _ in range(n)]


def from_all(check):
    """From a pod, the node and a backend."""
    def run(w):
        return ", ".join(f"{name}: {check(w, node)}" for name, node in w.clients().items())
    return run


def rules(w, node=None):
    node = node or w.one.gateway
    if w.backend == "nft":
        return node.run("nft", "list", "table", "ip", "weft")
    return node.run(f"{w.backend}-save")


def eq(got, want):
    expect(got == want, f"got {got!r}, want {want!r}")
