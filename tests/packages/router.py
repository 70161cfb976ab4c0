"""The package on a root like OpenWrt's: busybox, its own shell, and doubles of opkg, uci, procd and fw4 (router/). The
executable, the scripts and the kernel are real. The cases are one life: each goes on where the one before ended."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

from made import HOST, ROOT, packages, read, sh
from report import Skip, expect

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 60
# What the doubles and the system itself write.
NOISE = ("tmp/", "proc/", "sys/", "dev/", "usr/lib/opkg", "etc/rc.d/")
SERVICE = ("config service", "option name 'web'", "option namespace 'shop'", "option ip '10.96.0.10'", "list port '80'",
           "list endpoint '192.0.2.1:8080'")


class Router:
    """A root and namespaces of its own for mounts, processes and the network; all goes with it."""

    def __init__(self):
        self.top = tempfile.mkdtemp(prefix="weft-router-")
        for folder in ("bin", "sbin", "etc/config", "etc/init.d", "etc/rc.d", "usr/bin", "usr/sbin", "lib", "tmp", "proc",
                       "sys", "dev", "root"):
            os.makedirs(f"{self.top}/{folder}")
        shutil.copytree(f"{HERE}/router", self.top, dirs_exist_ok=True)
        os.symlink("tmp", f"{self.top}/var")
        os.makedirs(f"{self.top}/tmp/run")
        os.symlink("var/run", f"{self.top}/run")
        shutil.copy(shutil.which("busybox"), f"{self.top}/bin/busybox")
        for applet in sh("busybox", "--list").split():
            if not os.path.lexists(f"{self.top}/bin/{applet}") and applet != "busybox":
                os.symlink("busybox", f"{self.top}/bin/{applet}")
        os.symlink("../sbin/service", f"{self.top}/usr/bin/service")
        self.write("etc/opkg.conf", f"arch all 1\narch {HOST} 10\n")
        self.write("etc/config/dhcp", "config dnsmasq\n\toption domainneeded '1'\n\toption rebind_protection '1'\n")
        self.write("etc/init.d/dnsmasq", "#!/bin/sh\necho \"dnsmasq $*\" >>/tmp/dnsmasq.log\n")
        os.chmod(f"{self.top}/etc/init.d/dnsmasq", 0o755)
        self.write("etc/passwd", "root:x:0:0:root:/root:/bin/ash\n")
        self.write("etc/group", "root:x:0:\n")
        mounts = f"""
            mount --make-rprivate /
            mount -t proc proc {self.top}/proc
            mount -t sysfs sysfs {self.top}/sys
            mount --rbind /dev {self.top}/dev
            ip link set lo up
            echo ready; exec sleep 86400"""
        self.holder = subprocess.Popen(["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child",
                                        "sh", "-ec", mounts], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        expect(self.holder.stdout.readline() == "ready\n", "no namespaces")
        children = read(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").split()
        self.init = int(children[0])

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self.holder.wait()
        shutil.rmtree(self.top)

    def write(self, path, text):
        with open(f"{self.top}/{path}", "w", encoding="utf-8") as f:
            f.write(text)

    def text(self, path):
        with open(f"{self.top}/{path}", encoding="utf-8", errors="replace") as f:
            return f.read()

    def has(self, path):
        return os.path.lexists(f"{self.top}/{path}")

    def ash(self, line, check=True):
        """What somebody at the router types."""
        return sh("nsenter", "-t", str(self.init), "-n", "-m", "-p", "-i", "-u", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                  "HOME=/root", "IPKG_INSTROOT=", "chroot", self.top, "/bin/ash", "-c", line, check=check)

    def kernel(self, *words):
        """A program of this machine in the router's network."""
        return sh("nsenter", "-t", str(self.init), "-n", *words)

    def pid(self):
        return self.text("tmp/run/weft/weft.pid").strip()

    def until(self, what, line):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            said = self.ash(line, check=False)
            if what in said:
                return said
            time.sleep(0.1)
        raise AssertionError(f"{line}: never {what!r}, last {said!r}; log: {self.log()}")

    def log(self):
        return self.text("tmp/logread")[-1500:] if self.has("tmp/logread") else ""

    def errors(self):
        return self.text("tmp/procd/errors") if self.has("tmp/procd/errors") else ""

    def tree(self):
        """{path: what it is} of the root, without what the system writes."""
        out = {}
        for folder, _, names in os.walk(self.top):
            for name in names:
                path = os.path.relpath(f"{folder}/{name}", self.top)
                if not path.startswith(NOISE):
                    full = f"{self.top}/{path}"
                    out[path] = os.readlink(full) if os.path.islink(full) else read(full)
        return out


def left_in_kernel(router):
    return re.findall(r"weft\S*", router.kernel("ip", "-o", "link") + router.kernel("nft", "list", "ruleset"))


def installed(router, package):
    said = router.ash(f"opkg install /root/{os.path.basename(package)}")
    expect(router.has("etc/rc.d/S95weft") and router.has("etc/rc.d/K10weft"), "it is not enabled")
    expect(not router.has("tmp/procd/weft/now/main"), "it starts before anybody said so")
    expect(not left_in_kernel(router), left_in_kernel(router))
    for path in router.text("lib/upgrade/keep.d/weft").split():
        expect(re.match(r"/etc/(config/weft|weft\.bundle|weft\.toml|weft/)$", path), f"sysupgrade would keep {path}")
    expect("incompatible" in router.ash("sed -i 's/^arch [^a].*//' /etc/opkg.conf; opkg install /root/weft*", check=False),
           "another architecture is refused")
    router.write("etc/opkg.conf", f"arch all 1\narch {HOST} 10\n")
    return said


def first_minutes(router):
    """What README's five minutes has an owner type."""
    router.ash("cp /root/edge-1.bundle /etc/weft.bundle")
    router.ash("uci set weft.main.enabled=1; uci commit weft; service weft start")
    router.until("edge-1", "weft status 2>&1")
    expect(not router.errors(), router.errors())
    expect("weft0" in router.kernel("ip", "-o", "link"), "no weft0")
    expect('bundle = "/etc/weft.bundle"' in router.text("tmp/etc/weft.toml"), "the configuration")
    expect("udp dport 7843" in router.text("tmp/run/weft/fw4-input.nft"), "the firewall")
    expect(router.text("tmp/fw4.log") == "-q reload\n", "fw4 reads its rules once")
    return router.ash("weft status").splitlines()[0]


def knows_dnsmasq(router):
    """`weft setup` was called before the agent."""
    if "setup" not in router.ash("weft --help"):
        raise Skip("needs-setup: this executable has no `weft setup`")
    expect("notinterface 'weft0'" in router.text("etc/config/dhcp"), router.text("etc/config/dhcp"))
    return "weft0 is not dnsmasq's"


def reloads(router):
    before = router.pid()
    text = router.text("etc/config/weft")
    router.write("etc/config/weft", text + "\n" + "\n\t".join(SERVICE) + "\n")
    router.ash("service weft reload")
    router.until("web", "weft services 2>&1")
    expect(router.pid() == before, "a reload is no restart")
    times = router.log().count("reload")
    router.ash("service weft reload; sleep 0.3")
    expect(router.log().count("reload") == times, "nothing has changed, and it was told all the same")
    return f"still {before}"


# What takes a value of each kind that there is, and what it becomes.
KINDS = {"config dns": {"list stub 'corp.example=192.0.2.53,192.0.2.54'": 'stub = { "corp.example" = ["192.0.2.53", "192.0.2.54"] }'},
         "config balancer": {"list prefer 'node'": 'prefer = ["node"]', "option probe '10'": "probe = 10",
                             "option egress 'worker-*=worker-1'": 'egress = { "worker-*" = "worker-1" }'},
         "config proxy": {"option beside_kube_proxy '0'": "beside_kube_proxy = false"},
         "config admin": {"option http '127.0.0.1:7844'": 'http = "127.0.0.1:7844"'}}


def kinds(router):
    good, before = router.text("etc/config/weft"), router.pid()
    more = "".join(f"\n{table}\n" + "".join(f"\t{line}\n" for line in lines) for table, lines in KINDS.items())
    router.write("etc/config/weft", good + more)
    router.ash("service weft reload")
    toml = router.text("tmp/etc/weft.toml")
    for line in (line for lines in KINDS.values() for line in lines.values()):
        expect(line in toml.splitlines(), f"{line!r} is not in {toml}")
    said = router.kernel("curl", "-sS", "--retry-connrefused", "--retry", "50", "--retry-delay", "1", "http://127.0.0.1:7844/livez")
    expect(said.startswith("ok"), said)
    expect(router.pid() == before and not router.errors(), router.errors())
    router.write("etc/config/weft", good)
    router.ash("service weft reload")
    return f"{sum(map(len, KINDS.values()))} options"


def bad_edits(router):
    """The agent goes on with what it had; the log says what is wrong."""
    good, before, toml = router.text("etc/config/weft"), router.pid(), router.text("tmp/etc/weft.toml")
    for bad, said in ((good + "\nconfig dns\n\toption enable 'maybe'\n", 'dns.enable: "maybe" is neither 1 nor 0'),
                      (good + "\nconfig dnss\n", 'no section of the type "dnss"'),
                      (good + "\nconfig service\n\tlist port 'http'\n", 'service.port: "http" is not'),
                      (good.replace("config weft 'main'", "config weft 'main'\n\toption config '/etc/none.toml'"), "there is no /etc/none.toml")):
        router.write("etc/config/weft", bad)
        heard = router.ash("service weft reload 2>&1", check=False)
        expect(said in heard, f"{said!r} is not in {heard!r}")
        expect(router.pid() == before and router.text("tmp/etc/weft.toml") == toml, "it goes on as before")
    router.write("etc/config/weft", good + "\nconfig proxy\n\toption backned 'nft'\n")
    router.ash("service weft reload")
    router.until("backned", "cat /tmp/logread")
    expect(router.pid() == before, "a key that weft does not know is weft's to refuse")
    router.write("etc/config/weft", good)
    router.ash("service weft reload")
    return "5 kinds"


def own_file(router):
    """A weft.toml of the owner's in the place of the sections."""
    good, before = router.text("etc/config/weft"), router.pid()
    router.write("etc/weft.toml", '[node]\nbundle = "/etc/weft.bundle"\n[tunnel]\nlisten="[::]:7850" # x\n[[service]]\nname = "mine"\nnamespace = "shop"\n'
                 'ip = "10.96.0.11"\nports = [{ port = 80 }]\nendpoints = [{ address = "192.0.2.1" }]\n')
    router.ash("uci set weft.main.config=/etc/weft.toml; service weft reload")
    router.until("mine", "weft services 2>&1")
    expect("udp dport 7850" in router.text("tmp/run/weft/fw4-input.nft"), router.text("tmp/run/weft/fw4-input.nft"))
    router.write("etc/config/weft", good)
    router.ash("rm /etc/weft.toml; service weft reload")
    router.until("web", "weft services 2>&1")
    expect(router.pid() == before, "without a restart")


def respawns(router):
    before = router.pid()
    router.ash(f"kill -9 {before}")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and (not router.has("tmp/run/weft/weft.pid") or router.pid() == before):
        time.sleep(0.2)
    router.until("edge-1", "weft status 2>&1")
    return f"{before} was killed, {router.pid()} is there"


def state(router):
    """On tmpfs; on flash once it ends, and from there after a boot; not written where nothing has changed."""
    router.ash("service weft stop")
    expect(not left_in_kernel(router), left_in_kernel(router))
    expect(not router.has("tmp/run/weft/fw4-input.nft") and router.text("tmp/fw4.log").count("reload") == 4, "the firewall's rules stay")
    expect(router.has("etc/weft/snapshot"), "nothing is kept on flash")
    kept = os.stat(f"{router.top}/etc/weft/snapshot")
    expect(kept.st_mode & 0o777 == 0o600, "others may read it")
    router.ash("/usr/share/weft/keep once /var/lib/weft/snapshot /etc/weft/snapshot")
    expect(os.stat(f"{router.top}/etc/weft/snapshot").st_ino == kept.st_ino, "flash was written without need")
    flash = read(f"{router.top}/etc/weft/snapshot")
    router.ash("rm -r /var/lib/weft")  # a boot
    router.ash("/usr/share/weft/keep restore /etc/weft/snapshot /var/lib/weft/snapshot")
    expect(read(f"{router.top}/tmp/lib/weft/snapshot") == flash, "not what was kept")
    router.ash("rm -r /var/lib/weft; service weft start")
    router.until("edge-1", "weft status 2>&1")
    expect("hourly" in router.text("tmp/procd/weft/now/keep/command"), "nobody keeps it by the hour")
    return f"{len(flash)} bytes"


def switched_off(router):
    router.ash("uci set weft.main.enabled=0; service weft reload")
    router.until("gone", "weft status >/dev/null 2>&1 || echo gone")
    end = time.monotonic() + PATIENCE
    while left_in_kernel(router) and time.monotonic() < end:
        time.sleep(0.1)
    expect(not left_in_kernel(router), left_in_kernel(router))
    router.ash("uci set weft.main.enabled=1; service weft start")
    router.until("edge-1", "weft status 2>&1")


def upgraded(router, package):
    before = router.pid()
    said = router.ash(f"opkg install /root/{os.path.basename(package)}")
    router.until("web", "weft services 2>&1")
    expect(router.pid() != before, "the old one still runs")
    expect(router.text("etc/config/weft").count("enabled '1'") == 1, "the configuration is lost")
    expect(router.has("etc/weft/snapshot"), "the state is lost")
    router.ash("rm -f /etc/config/weft-opkg")
    return said.splitlines()[0]


def removed(router, before):
    said = router.ash("opkg remove weft 2>&1")
    expect("/etc/weft.bundle" in said, f"it says nothing of the secret: {said}")
    expect(not left_in_kernel(router), left_in_kernel(router))
    after = router.tree()
    # The owner's own: a secret that was brought, a configuration that was changed.
    expect(set(after) - set(before) == {"etc/weft.bundle", "etc/config/weft"}, sorted(set(after) - set(before)))
    changed = [p for p in before if after.get(p) != before[p]]
    expect(not changed, f"changed: {changed}")
    for path in ("tmp/run/weft", "tmp/lib/weft", "tmp/etc/weft.toml", "etc/rc.d/S95weft", "etc/rc.d/K10weft", "etc/weft", "usr/share/weft",
                 "usr/share/nftables.d"):
        expect(not router.has(path), f"{path} is left")
    expect("weft" not in router.ash("ps"), "it still runs")
    return "nothing but the owner's own files"


def firewall():
    """The include in a ruleset shaped like fw4's is one that nft takes, with rules and without."""
    with tempfile.TemporaryDirectory() as top:
        include = read(f"{ROOT}/packaging/openwrt/root/usr/share/nftables.d/chain-pre/input/weft.nft").decode()
        include = include.replace("/var/run/weft", top)
        ruleset = f"table inet fw4 {{\n chain input {{\n  type filter hook input priority filter; policy drop;\n  {include}" \
                  "  iifname \"lo\" accept\n }\n}\n"
        def check():
            return sh("unshare", "-n", "sh", "-c", "nft -c -f - && nft -f - </dev/null", stdin=ruleset)
        check()
        script = "config_get() { eval \"$1=\\$4\"; }; config_get_bool() { eval \"$1=\\$4\"; }; . packaging/openwrt/root/etc/init.d/weft; rules"
        rules = sh("busybox", "ash", "-c", script)
        with open(f"{top}/fw4-input.nft", "w", encoding="utf-8") as f:
            f.write(rules)
        check()
        listed = sh("unshare", "-n", "sh", "-c", "nft -f - && nft list ruleset", stdin=ruleset)
        expect('accept comment "weft: connections to Services"' in listed and "udp dport 7843" in listed, listed)
    return f"{len(rules.splitlines())} rules"


def cases(report):
    report.case("fw4-include", firewall)
    if not report.wants("router"):
        return
    if os.geteuid():
        report.case("router", lambda: (_ for _ in ()).throw(Skip("needs-root")))
        return
    router = Router()
    try:
        package = packages("ipk")[HOST]
        before = router.tree()
        shutil.copy(package, f"{router.top}/root/")
        weft = f"{ROOT}/target/cross/{HOST}-unknown-linux-musl/release/weft"
        sh(weft, "ca", "init", "--dir", f"{router.top}/tmp/ca")
        issue = (weft, "ca", "issue", "--dir", f"{router.top}/tmp/ca")
        sh(*issue, "--node", "relay-1", "--role", "relay", "--out", f"{router.top}/tmp/relay-1.bundle")
        sh(*issue, "--node", "edge-1", "--relay", "relay-1@192.0.2.9:7843",
           "--out", f"{router.top}/root/edge-1.bundle")
        before |= {p: c for p, c in router.tree().items() if p.startswith("root/")}
        for name, case, *more in (("install", installed, package), ("first-minutes", first_minutes), ("dnsmasq", knows_dnsmasq),
                                  ("reload", reloads), ("kinds", kinds), ("bad-edits", bad_edits), ("own-file", own_file), ("respawn", respawns),
                                  ("state", state), ("switch-off", switched_off), ("upgrade", upgraded, package),
                                  ("remove", removed, before)):
            report.case(f"router-{name}", case, router, *more)
    finally:
        router.close()
