"""DNS servers in namespaces, pinned to one core, and what loads them from the other: for `dns` and `dns_stress`."""
import contextlib
import glob
import json
import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, f"{HERE}/../netns")

from natlab import wait_for, weft  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
SERVER_CORE, LOAD_CORE = "0", "1"
URGENT = ("chrt", "-f", "1")
# What is loaded, and what loads it: others on this machine get less, and still their share.
AHEAD = ("nice", "-n", "-10")
UPSTREAM = ("taskset", "-c", LOAD_CORE, "dnsmasq", "-k", "--no-hosts", "--no-resolv", "--bind-interfaces",
            "--listen-address=127.0.0.9", "--port=5390", "--local-ttl=3600", "--address=/foreign.example/192.0.2.9",
            "--conf-file=/dev/null", "--pid-file")


def install():
    wanted = {"dnsperf": "dnsperf", "dnsmasq": "dnsmasq-base", "unbound": "unbound"}
    missing = [package for program, package in wanted.items() if not shutil.which(program)]
    if missing:
        # RUNLEVEL=1: no server is started on this host.
        env = {**os.environ, "RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], env=env, check=True,
                       stdout=subprocess.DEVNULL)


def cpu_of(pid):
    """Seconds in user mode and in the kernel, of all threads, and of its children: dnsmasq has one for each connection.
    Those that have ended are known to a tick only."""
    used, todo = 0.0, [pid]
    while todo:
        pid = todo.pop()
        for thread in glob.glob(f"/proc/{pid}/task/*"):
            with contextlib.suppress(OSError):
                with open(f"{thread}/schedstat", encoding="ascii") as f:
                    used += int(f.read().split()[0]) / 1e9
                with open(f"{thread}/children", encoding="ascii") as f:
                    todo += map(int, f.read().split())
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii") as f:
            used += sum(map(int, f.read().rsplit(")", 1)[1].split()[13:15])) / TICK
    return used


@contextlib.contextmanager
def urgent(pid):
    """Before everything that is not, and back."""
    subprocess.run(["chrt", "-a", "-f", "-p", "1", str(pid)], check=True)
    try:
        yield
    finally:
        subprocess.run(["chrt", "-a", "-o", "-p", "0", str(pid)], check=False)


class Server:
    def __init__(self, node, name, argv, address, port, env=None):
        self.node, self.name, self.address, self.port = node, name, address, port
        env = {**os.environ, "WEFT_LOG": "warn", "GOMAXPROCS": "1", **(env or {})}
        log = f"{node.lab.folder}/{node.name}-{name}.log"
        self.process = node.spawn(*AHEAD, "taskset", "-c", SERVER_CORE, *argv, env=env, log=log)

    def at(self, name, address, port):
        """The same process by another address."""
        other = object.__new__(Server)
        other.__dict__.update({**self.__dict__, "name": name, "address": address, "port": port})
        return other

    def load(self, names, seconds, *options, first=AHEAD):
        """Queries completed, CPU seconds of the server meanwhile, and what dnsperf printed."""
        before = cpu_of(self.process.pid)
        said = self.node.run(*first, "taskset", "-c", LOAD_CORE, "dnsperf", "-s", self.address, "-p", str(self.port), "-d", names,
                             "-l", str(seconds), "-c", "8", "-q", "200", *options, timeout=seconds + 30)
        used = cpu_of(self.process.pid) - before
        done = int(re.search(r"Queries completed: +(\d+)", said)[1])
        good = re.search(r"NOERROR (\d+)", said)
        if not done or not good or int(good[1]) < done * 0.99:
            raise SystemExit(f"{self.name}: {said}")
        return done, used, said

    def alone(self, names, seconds, *options):
        """The same, while nothing else on this machine runs."""
        with urgent(self.process.pid):
            return self.load(names, seconds, *options, first=URGENT)

    def latencies(self, names, seconds, rate):
        """µs, sorted, at so many queries a second."""
        _, _, said = self.alone(names, seconds, "-Q", str(rate), "-v")
        return sorted(float(t) * 1e6 for t in re.findall(r"^> NOERROR \S+ \S+ ([\d.]+)", said, re.M))

    def ready(self, files):
        """Also fills the caches."""
        def answers():
            if not self.process.alive():
                raise SystemExit(f"{self.name} has ended: {self.process.text()[-800:]}")
            try:
                return all(self.load(names, 1, "-Q", "5000") for names in files)
            except SystemExit:
                return False
        wait_for(answers, 90, 0.5, what=lambda: f"{self.name} answers: {self.process.text()[-800:]}")


def rate_of(said):
    return float(re.search(r"Queries per second: +([\d.]+)", said)[1])


def start_weft(lab, node, name, path, manifest, **dns):
    """At an address of its own, 127.0.0.1:5300, and at weft0's."""
    config = {"node": {"name": "edge-1", "state_dir": f"{lab.folder}/state-{name}"},
              "admin": {"socket": f"{lab.folder}/{name}.sock"}, "kube": {"manifests": [manifest]},
              "tunnel": {"enable": False}, "proxy": {"enable": False},
              "dns": {"upstream": ["127.0.0.9:5390"], "cache": 10000, "listen_also": ["127.0.0.1:5300"], **dns}}
    weft.write(f"{lab.folder}/{name}.toml", weft.toml(config))
    return Server(node, name, [path, "run", "--config", f"{lab.folder}/{name}.toml"], "127.0.0.1", 5300)


def dumped(rows):
    print(json.dumps(rows), file=sys.stderr)
