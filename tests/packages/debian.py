"""The package on Debian: what lintian and systemd say of it, and a clean root that is as before once it is purged."""
import os
import re
import shutil
import subprocess
import tempfile

from made import ROOT, packages, read, sh
from report import Skip, expect

UNIT = f"{ROOT}/packaging/debian/weft.service"
# Of 10, in tenths: what systemd calls "OK" begins at 5.0 and below.
EXPOSURE_MAX = 30
# What dpkg itself keeps and logs.
NOISE = re.compile(r"(var/lib/dpkg/|var/log/|var/cache/|etc/\.pwd\.lock|etc/ld\.so\.cache|var/lib/systemd/deb-systemd-helper)")


def lintian(path):
    said = sh("lintian", "--allow-root", "--no-tag-display-limit", path, check=False)
    errors = [line for line in said.splitlines() if line.startswith("E:")]
    expect(not errors, errors)
    warnings = [line for line in said.splitlines() if line.startswith("W:")]
    return "; ".join(warnings) or "not even a warning"


def verified():
    """Where the executable is, as the package has it."""
    with tempfile.TemporaryDirectory() as top:
        unit = read(UNIT).decode()
        expect("ExecStart=/usr/sbin/weft " in unit, "the executable's place")
        with open(f"{top}/weft.service", "w", encoding="utf-8") as f:
            f.write(unit.replace("/usr/sbin/weft", "/bin/true").replace("Documentation=man:weft(8)\n", ""))
        said = sh("systemd-analyze", "verify", "--recursive-errors=no", f"{top}/weft.service", check=False)
        expect("weft.service" not in said, said)


def exposure():
    if "--offline" not in sh("systemd-analyze", "--help"):
        raise Skip("needs-systemd-250")
    said = sh("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", UNIT)
    return said.strip().splitlines()[-1]


def tree(root):
    out = {}
    for folder, folders, names in os.walk(root):
        for name in names + folders:
            path = os.path.relpath(f"{folder}/{name}", root)
            if NOISE.match(path):
                continue
            full = f"{root}/{path}"
            out[path] = os.readlink(full) if os.path.islink(full) else read(full) if os.path.isfile(full) else "a folder"
    return out


def purged(path):
    """Installed, used, removed and purged in a root of Debian's essential packages alone."""
    if os.geteuid():
        raise Skip("needs-root")
    top = tempfile.mkdtemp(prefix="weft-debian-")
    root = f"{top}/root"
    try:
        release = re.search(r"VERSION_CODENAME=(\w+)", read("/etc/os-release").decode())[1]
        sh("mmdebstrap", "--quiet", "--variant=essential", "--mode=root", "--include=init-system-helpers", release, root)
        before = tree(root)
        shutil.copy(path, f"{root}/weft.deb")

        def inside(*words):
            return sh("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec",
                      'mount --make-rprivate /; mount -t proc proc "$0/proc"; exec chroot "$0" "$@"', root, *words,
                      env={"DEBIAN_FRONTEND": "noninteractive", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
        inside("dpkg", "-i", "/weft.deb")
        expect("weft" in inside("weft", "version", "--self-test"), "it does not run")
        expect(os.path.islink(f"{root}/etc/systemd/system/multi-user.target.wants/weft.service"), "it is not enabled")
        # The configuration that is installed is a good one.
        said = sh("unshare", "--net", "chroot", root, "weft", "run", "--config", "/etc/weft.toml", "--bundle", "/etc/none", check=False)
        expect("/etc/none" in said and "weft.toml" not in said, said)
        os.makedirs(f"{root}/var/lib/weft", exist_ok=True)
        for left in ("var/lib/weft/snapshot", "etc/weft.bundle"):
            with open(f"{root}/{left}", "w", encoding="utf-8") as f:
                f.write("x")
        inside("dpkg", "-r", "weft")
        expect(os.path.exists(f"{root}/etc/weft.toml") and os.path.exists(f"{root}/etc/weft.bundle"), "remove is no purge")
        inside("dpkg", "-i", "/weft.deb")
        inside("dpkg", "-P", "weft")
        os.remove(f"{root}/weft.deb")
        after = tree(root)
        differ = sorted(p for p in {*before, *after} if before.get(p) != after.get(p))
        expect(not differ, f"not as before: {differ}")
        return f"{len(before)} files and folders as before"
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", top], check=False)


def cases(report):
    path = packages("deb")["amd64"] if "amd64" in packages("deb") else next(iter(packages("deb").values()))
    report.case("lintian", lintian, path)
    report.case("unit-verify", verified)
    report.case("unit-exposure", exposure)
    report.case("debian-purge", purged, path)
