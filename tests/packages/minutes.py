"""README's five minutes: its lines as they stand there, typed by somebody new to it. Others than there are the architecture,
which is this machine's, and the relay's name, which is its address. OpenWrt is router.py's root; Debian is booted, with
systemd and resolved, by systemd-nspawn. What was typed and seen goes to target/tests/minutes-*.txt.

    relay 192.0.2.9 ── 192.0.2.1 the machine, edge-1 192.168.1.1 ── 192.168.1.20 a client, and at port 8080 the Service's web server
"""
import glob
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

from made import HOST, PACKAGES, ROOT, read, sh
from report import Skip, expect
from router import PATIENCE, Router, left_in_kernel

WEFT = f"{ROOT}/target/cross/{HOST}-unknown-linux-musl/release/weft"
DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}.get(HOST, HOST)
PAGE = "what the web server says\n"


def block(label):
    """The lines of README's first block after `label`, below "Install"."""
    install = read(f"{ROOT}/README.md").decode().split("\n## Install\n")[1].split("\n## ")[0]
    expect(label in install, f"README has no {label!r}")
    found = re.search(r"\n\n((?:(?: {4}.*)?\n)+)", install.split(label, 1)[1])[1]
    return [line[4:] for line in found.splitlines() if line]


class Minutes:
    """A machine between a relay and a client; `inside` types at the machine. `network`: a process in its network namespace."""

    def __init__(self, name, inside, network):
        self.name, self.inside, self.network = name, inside, network
        self.admin = tempfile.mkdtemp(prefix="weft-minutes-")
        self.tag = f"wm{os.getpid()}"
        self.children, self.seen = [], []
        for place, inner, outer, near, far in (("wan", "wan", "eth0", "192.0.2.1/24", "192.0.2.9/24"),
                                               ("lan", "lan", "eth0", "192.168.1.1/24", "192.168.1.20/24")):
            space = f"{self.tag}{place}"
            sh("ip", "netns", "add", space)
            sh("ip", "-n", space, "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", network)
            for line in (f"addr add {far} dev {outer}", f"link set {outer} up", "link set lo up"):
                sh("ip", "-n", space, *line.split())
            for line in (f"addr add {near} dev {inner}", f"link set {inner} up"):
                self.near("ip", *line.split())
        self.near("ip", "route", "add", "default", "via", "192.0.2.9")
        self.near("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.at("lan", "ip", "route", "add", "default", "via", "192.168.1.1")
        with open(f"{self.admin}/index.html", "w", encoding="utf-8") as f:
            f.write(PAGE)
        self.start("lan", "python3", "-m", "http.server", "8080", "--directory", self.admin)

    def near(self, *words):
        """A program of this machine in the other's network."""
        return sh("nsenter", "-t", self.network, "-n", *words)

    def at(self, place, *words, check=True):
        return sh("ip", "netns", "exec", f"{self.tag}{place}", *words, check=check)

    def start(self, place, *words):
        with open(f"{self.admin}/{place}.log", "ab") as log:
            self.children.append(subprocess.Popen(["ip", "netns", "exec", f"{self.tag}{place}", *words], stdout=log, stderr=log,
                                                  cwd=self.admin))

    def type(self, where, line, run):
        said = re.sub(r"\(Reading database \.\.\.( *\d+%)? *\n", "", run())
        self.seen.append(f"{where} {line}\n{said.rstrip()}".rstrip())
        return said

    def here(self, line):
        """At the machine."""
        return self.type("root@edge-1#", line, lambda: self.inside(f"exec 2>&1; {line}"))

    def authority(self):
        """The bundles, and the relay, which is told nothing but that it is one."""
        for line in block("Make the cluster's authority once"):
            line = line.replace("relay.example", "192.0.2.9")
            self.type("admin$", line, lambda line=line: sh("sh", "-ec", f'cd "$0"; PATH={os.path.dirname(WEFT)}:$PATH; {line}', self.admin))
        with open(f"{self.admin}/relay.toml", "w", encoding="utf-8") as f:
            f.write("[relay]\nenable = true\n")
        # With a /run and a /var/lib of its own.
        self.start("wan", "sh", "-ec", 'mount -t tmpfs run /run; mount -t tmpfs lib /var/lib; exec "$@"', "sh",
                   WEFT, "run", "--config", "relay.toml", "--bundle", "relay-1.bundle")

    def service(self):
        """The block that README has of a Service without any Kubernetes."""
        lines = block("What there is, in `weft.toml`")
        return "\n".join(lines[next(n for n, line in enumerate(lines) if line.startswith("[[service]]")):]) + "\n"

    def until(self, what, run, told):
        end = time.monotonic() + PATIENCE
        while what not in (said := run()):
            expect(time.monotonic() < end, f"{told}: never {what!r}, last {said!r}")
            time.sleep(0.2)
        return said

    def reached(self):
        """README's last lines, at the machine and at a client of it."""
        curl, resolve = block("And then, there or at a client")
        self.until("edge-1", lambda: self.inside("weft status 2>&1 || true"), "weft status")
        self.until(PAGE.strip(), lambda: self.at("lan", *curl.split(), "-s", "--max-time", "5", check=False), "a client")
        self.type("client$", curl, lambda: self.at("lan", *curl.split()))
        expect("10.96.0.10" in self.here(resolve), "weft resolve")
        self.until("relay-1", lambda: self.inside("weft status --json"), "the relay")
        said = self.here("weft status")
        expect(re.search(r"relay-1\b", said), said)

    def close(self):
        os.makedirs(f"{ROOT}/target/tests", exist_ok=True)
        with open(f"{ROOT}/target/tests/minutes-{self.name}.txt", "w", encoding="utf-8") as f:
            f.write("\n".join(self.seen) + "\n")
        for child in self.children:
            child.terminate()
        for child in self.children:
            child.wait()
        for place in ("wan", "lan"):
            sh("ip", "netns", "del", f"{self.tag}{place}", check=False)
        shutil.rmtree(self.admin)


def openwrt():
    router = Router()
    minutes = None
    try:
        minutes = Minutes("openwrt", router.ash, str(router.init))
        minutes.authority()
        begin = time.monotonic()
        there = False
        for line in block("**OpenWrt**"):
            if line.startswith("ssh "):
                there = True
            elif there:
                minutes.here(line)
            else:
                # scp, with the name that this router's opkg would have.
                line = re.sub(r"_\*_\S+\.ipk", f"_*_{HOST}.ipk", line)
                _, _, *names, target = line.split()
                for name in names:
                    found = glob.glob(f"{PACKAGES}/{name}") + glob.glob(f"{minutes.admin}/{name}")
                    expect(len(found) == 1, f"{name}: {found}")
                    shutil.copy(found[0], router.top + target.partition(":")[2])
                minutes.seen.append(f"admin$ {line}")
        for line in block("On OpenWrt the keys"):
            minutes.here(line)
        minutes.reached()
        expect(PAGE in minutes.here("wget -q -O - http://10.96.0.10/"), "at the router itself")
        took = time.monotonic() - begin
        minutes.here("opkg remove weft")
        expect(not left_in_kernel(router), left_in_kernel(router))
        left = sorted(p for p in router.tree() if "weft" in p)
        expect(set(left) == {"etc/weft.bundle", "etc/config/weft"}, left)
        return f"{took:.0f} s"
    finally:
        if minutes:
            minutes.close()
        router.close()


class Booted:
    """A Debian that systemd-nspawn has booted, in a network namespace of its own."""

    def __init__(self):
        self.top = tempfile.mkdtemp(prefix="weft-minutes-debian-")
        self.root, self.nspawn = f"{self.top}/root", None
        release = re.search(r"VERSION_CODENAME=(\w+)", read("/etc/os-release").decode())[1]
        wanted = "init-system-helpers,systemd-sysv,dbus,systemd-resolved,curl"
        sh("mmdebstrap", "--quiet", "--variant=apt", "--mode=root", f"--include={wanted}", release, self.root)
        with open(f"{self.top}/log", "wb") as log:
            self.nspawn = subprocess.Popen(["systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}", f"--machine=weft{os.getpid()}",
                                            "--register=no", "--keep-unit", "--resolv-conf=off",
                                            "--private-network"],
                                           stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + PATIENCE
        while "running" not in (state := self.inside("systemctl is-system-running", check=False)):
            if self.nspawn.poll() is not None:
                raise Skip(f"needs-nspawn: {self.said()}")
            expect("degraded" not in state and time.monotonic() < end, f"it does not boot: {state}{self.said()}")
            time.sleep(0.2)

    def said(self):
        return read(f"{self.top}/log").decode(errors="replace")[-600:]

    def first(self):
        """Its process 1, as this machine numbers it."""
        children = read(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children").split()
        return children[0].decode() if children else None

    def inside(self, line, check=True):
        pid = self.first()
        if not pid:
            return ""
        return sh("nsenter", "-t", pid, *"-m -p -n -i -u -C -r -w env -i".split(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
                  "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "sh", "-c", f"cd /root; {line}", check=check)

    def close(self):
        if self.nspawn and self.nspawn.poll() is None:
            if pid := self.first():
                os.kill(int(pid), signal.SIGKILL)
            else:
                self.nspawn.kill()
            self.nspawn.wait()
        subprocess.run(["rm", "-rf", "--one-file-system", self.top], check=False)


def debian():
    machine = minutes = None
    try:
        machine = Booted()
        minutes = Minutes("debian", machine.inside, machine.first())
        minutes.authority()
        for path in (f"{minutes.admin}/edge-1.bundle", *glob.glob(f"{PACKAGES}/weft_*_{DEBIAN}.deb")):
            shutil.copy(path, f"{machine.root}/root/")
        begin = time.monotonic()
        for line in block("**Debian**"):
            try:
                minutes.here(re.sub(r"_\*_\w+\.deb", f"_*_{DEBIAN}.deb", line))
            except AssertionError as e:
                raise AssertionError(f"{e}; {machine.inside('journalctl -q --no-pager -u weft -n 20', check=False)}") from None
        minutes.here("cat >>/etc/weft.toml <<'END'\n" + minutes.service() + "END")
        minutes.here("systemctl reload weft")
        minutes.reached()
        for place in ("10.96.0.10", "web.shop.svc.cluster.local"):
            expect(PAGE in minutes.here(f"curl -sS http://{place}/"), "at the machine itself")
        took = time.monotonic() - begin
        minutes.here("systemctl show weft -p ActiveState,NRestarts")
        minutes.here("apt purge -y weft")
        left = re.findall(r"weft\S*", minutes.near("ip", "-o", "link") + minutes.near("nft", "list", "ruleset"))
        expect(not left, left)
        files = sh("find", machine.root, "-xdev", "-path", f"{machine.root}/var/log", "-prune", "-o", "-name", "*weft*", "-print")
        files = [f for f in files.split() if "/root/root/" not in f and "dpkg" not in f]
        expect(not files, files)
        return f"{took:.0f} s"
    finally:
        if minutes:
            minutes.close()
        if machine:
            machine.close()


def cases(report):
    named = [("minutes-openwrt", openwrt), ("minutes-debian", debian)]
    if os.environ.get("CI") == "true":
        print("not run: minutes-debian, which boots a Debian: tests/packages/run without CI=true")
        named.pop()
    for name, case in named:
        report.case(name, case if not os.geteuid() else lambda: (_ for _ in ()).throw(Skip("needs-root")))
