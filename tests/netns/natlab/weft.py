"""The product in a lab: its executable, its CA, its configuration, its processes."""
import json
import os
import shutil
import signal
import socket
import subprocess

from .kernel import LabError
from .world import wait_for

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))
PORT = 7843
ADDRESS = "169.254.96.16"  # weft0's
READY = 10.0


def executable():
    """WEFT names one; else the release build of this tree."""
    path = os.environ.get("WEFT") or os.path.join(os.environ.get("CARGO_TARGET_DIR", f"{ROOT}/target"), "release", "weft")
    if not os.access(path, os.X_OK):
        raise LabError(f"no executable {path}: cargo build --release, or WEFT=path")
    return os.path.abspath(path)


class Authority:
    """A CA directory, used by the product's own commands."""

    def __init__(self, folder, init=True):
        self.folder, self.bundles = folder, 0
        if init:
            self.ca("init", "--dir", folder)

    @staticmethod
    def ca(*args):
        done = subprocess.run([executable(), "ca", *args], text=True, capture_output=True, timeout=30)
        if done.returncode:
            raise LabError(f"weft ca {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def issue(self, node, relays=(), role=None, days=None, key=None):
        """Path of the new bundle."""
        self.bundles += 1
        out = f"{self.folder}/{node}.{self.bundles}.bundle"
        args = ["issue", "--node", node, "--dir", self.folder, "--out", out]
        for flag, value in (("--role", role), ("--days", days), ("--public-key", key)):
            args += [flag, str(value)] if value is not None else []
        for relay in relays:
            args += ["--relay", relay]
        self.ca(*args)
        return out

    def twin(self, folder, psk):
        """The same CA with another psk file."""
        shutil.copytree(self.folder, folder)
        write(f"{folder}/psk", psk, 0o600)
        return Authority(folder, init=False)

    def psk(self):
        with open(f"{self.folder}/psk", encoding="ascii") as f:
            return f.read()


def write(path, text, mode=0o644):
    """Whole or not at all: a reader never sees half a file."""
    with open(path + ".new", "w", encoding="utf-8") as f:
        f.write(text)
    os.chmod(path + ".new", mode)
    os.replace(path + ".new", path)


def toml(config):
    """Tables of plain values; lists of tables under `service`."""
    out = []
    for name, table in config.items():
        if name != "service":
            out += [f"[{name}]", *(f"{k} = {_value(v)}" for k, v in table.items()), ""]
    for service in config.get("service", []):
        out += ["[[service]]", *(f"{k} = {_value(v)}" for k, v in service.items() if v is not None), ""]
    return "\n".join(out)


def _value(v):
    if isinstance(v, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_value(x)}" for k, x in v.items() if x is not None) + " }"
    if isinstance(v, (list, tuple)):
        return "[" + ", ".join(map(_value, v)) + "]"
    return json.dumps(v)  # strings, numbers and booleans are written alike in both


def service(name, ip, port, endpoints, target=None, namespace="shop", sticky=None):
    """A Service with one TCP port; endpoints are (address, node)."""
    one = {"port": port, "target": target, "protocol": "TCP"}
    return {"name": name, "namespace": namespace, "ip": ip, "ports": [one], "sticky": sticky,
            "endpoints": [{"address": a, "node": n} for a, n in endpoints]}


def manifests(services, indent=1):
    """The same Services as `kubectl get services,endpointslices -A -o json` prints them."""
    items = []
    for s in services:
        meta = {"name": s["name"], "namespace": s["namespace"]}
        affinity = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": s["sticky"]}}} \
            if s.get("sticky") else {"sessionAffinity": "None"}
        items.append({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {
            "type": "ClusterIP", "clusterIP": s["ip"], "clusterIPs": [s["ip"]], "ipFamilies": ["IPv4"], **affinity,
            "ports": [{"name": "", "port": p["port"], "targetPort": p["target"] or p["port"], "protocol": p["protocol"]}
                      for p in s["ports"]]}})
        items.append({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                      "metadata": {"name": f"{s['name']}-lab01", "namespace": s["namespace"],
                                   "labels": {"kubernetes.io/service-name": s["name"]}},
                      "ports": [{"name": "", "port": p["target"] or p["port"], "protocol": p["protocol"]} for p in s["ports"]],
                      "endpoints": [{"addresses": [e["address"]], "nodeName": e["node"],
                                     "conditions": {"ready": True, "serving": True, "terminating": False}}
                                    for e in s["endpoints"]]})
    return json.dumps({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": items}, indent=indent)


class Agent:
    """One `weft run` in a node's namespace."""

    def __init__(self, node, name, bundle, config, env=None):
        self.node, self.name, self.bundle, self.config, self.env = node, name, bundle, config, env
        self.folder = f"{node.lab.folder}/{name}"
        os.makedirs(f"{self.folder}/state", exist_ok=True)
        self.path, self.socket = f"{self.folder}/weft.toml", f"{self.folder}/weft.sock"
        self.log, self.process = f"{self.folder}/log", None
        config.setdefault("node", {}).setdefault("state_dir", f"{self.folder}/state")
        config.setdefault("admin", {}).setdefault("socket", self.socket)
        if backend := os.environ.get("WEFT_BACKEND"):
            config.setdefault("proxy", {}).setdefault("backend", backend)
        self.configure()

    def configure(self):
        write(self.path, toml(self.config))

    def start(self, ready=True):
        argv = [executable(), "run", "--config", self.path]
        argv += ["--bundle", self.bundle] if self.bundle else []
        env = {**os.environ, "WEFT_LOG": os.environ.get("WEFT_LOG", "info"), **(self.env or {})}
        self.process = self.node.spawn(*argv, log=self.log, env=env)
        if ready:
            self.wait_ready()
        return self

    def wait_ready(self):
        def answers():
            if not self.process.alive():
                raise LabError(f"{self.name} ended with {self.process.wait()}:\n{self.tail()}")
            return self.tell("status")
        wait_for(answers, READY, 0.01, what=lambda: f"{self.name} answers `weft status`; its log:\n{self.tail()}")

    def ask(self, *command, check=True):
        """JSON that `weft COMMAND --json` prints; None where it fails and may."""
        argv = [executable(), command[0], "--socket", self.config["admin"]["socket"], "--json", *command[1:]]
        text = self.node.run(*argv, check=check)
        return json.loads(text) if text.strip() else None

    def tell(self, command):
        """The same by its socket, without a process; None where nobody answers."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5)
            try:
                s.connect(self.config["admin"]["socket"])
                s.sendall(command.encode() + b"\n")
                text = b"".join(iter(lambda: s.recv(1 << 16), b""))
            except OSError:
                return None
        return json.loads(text) if text else None

    def say(self, *command):
        """What the command prints for people."""
        return self.node.run(executable(), command[0], "--socket", self.config["admin"]["socket"], *command[1:])

    def counters(self):
        """{"tunnel_rx_datagrams": 3, …}"""
        return self.ask("status")["counters"]

    def peer(self, name):
        """What it says of a peer; {} where it knows none of that name."""
        peers = (self.tell("peers") or {}).get("peers", [])
        return next((p for p in peers if p["name"] == name), {})

    def path_to(self, peer):
        """"direct", "relay" or "none", as the agent says."""
        return self.peer(peer).get("path")

    def registered(self, relays=1):
        """Whether so many relays have us."""
        status = self.tell("status") or {}
        return sum(bool(r.get("registered")) for r in status.get("relays", [])) >= relays

    def serving(self, relays=1):
        """Registered, and clients are caught by the rules: before that a SYN may be lost, which costs a second."""
        status = self.tell("status") or {}
        rules = any(p["name"] == "rules" and p["on"] and p["note"] != "none yet" for p in status.get("parts", []))
        return rules and sum(bool(r.get("registered")) for r in status["relays"]) >= relays

    def forget(self):
        """Nothing is left of an earlier life but the bundle."""
        shutil.rmtree(self.config["node"]["state_dir"], ignore_errors=True)
        os.makedirs(self.config["node"]["state_dir"])

    def stop(self):
        """SIGTERM; its exit code, None where it had to be killed."""
        self.process.signal(signal.SIGTERM)
        code = self.process.wait(10)
        if code is None:
            self.process.end()
        return code

    def kill(self):
        self.process.signal(signal.SIGKILL)
        self.process.wait(5)

    def text(self):
        with open(self.log, encoding="utf-8", errors="replace") as f:
            return f.read()

    def tail(self, lines=15):
        try:
            return "\n".join(self.text().splitlines()[-lines:])
        except OSError:
            return ""


class Cluster:
    """A relay, a DNS server of the outside world, and sites whose gateways are called edge-1, edge-2, …"""

    def __init__(self, lab, nats=("port-restricted", "port-restricted"), hosts=("client", "web"), zone=None, lan=None):
        self.lab, self.agents = lab, {}
        self.relay_host, self.dns_host = lab.host("relay"), lab.host("dns")
        self.zone = zone or {"www.outside.example": self.dns_host.address}
        self.sites = {f"edge-{i}": lab.site(f"s{i}", nat, hosts, lan=lan) for i, nat in enumerate(nats, 1)}
        self.authority = Authority(f"{lab.folder}/ca")
        self.relay_bundle = self.authority.issue("relay-1", role="relay")
        self.relay_at = f"relay-1@{self.relay_host.address}:{PORT}"

    def relay(self):
        """The relay's agent; made on first use."""
        if "relay-1" not in self.agents:
            config = {"relay": {"enable": True}, "dns": {"enable": False}, "proxy": {"enable": False}}
            self.agents["relay-1"] = Agent(self.relay_host, "relay-1", self.relay_bundle, config)
        return self.agents["relay-1"]

    def edge(self, name, services=(), bundle=None, files=None, env=None, **tables):
        """A gateway's agent with Services of the config, or of a manifest (`files`: their list)."""
        config = {"dns": {"upstream": [f"{self.dns_host.address}:53"]}, **tables}
        gateway = self.sites[name].gateway
        bundle = bundle or self.authority.issue(name, [self.relay_at])
        if files is not None:
            path = f"{self.lab.folder}/{name}-services.json"
            write(path, manifests(files))
            config["kube"] = {"manifests": [path]}
        if services:
            config["service"] = list(services)
        self.agents[name] = Agent(gateway, name, bundle, config, env)
        return self.agents[name]

    def start(self, *names):
        for name in names or self.agents:
            self.agents[name].start()
        edges = [a for n, a in self.agents.items() if n.startswith("edge") and a.process]
        if "relay-1" in self.agents and self.agents["relay-1"].process:
            for agent in edges:
                wait_for(agent.registered, READY, what=lambda: f"{agent.name} is registered at the relay; its log:\n{agent.tail()}")
