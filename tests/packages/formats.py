"""What is in each package, by readers of our own, and by the real tools where they are."""
import gzip
import hashlib
import io
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib

from made import ROOT, packages, read, sh, version
from report import Skip, expect

# e_machine, bytes a word, order; and flags that must be there (EF_MIPS_ABI_O32 and MIPS32r2; EF_ARM_EABI_VER5).
ELF = {"x86_64": (62, 2, "<", 0), "amd64": (62, 2, "<", 0), "aarch64": (183, 2, "<", 0), "arm64": (183, 2, "<", 0),
       "arm": (40, 1, "<", 0x05000000), "armhf": (40, 1, "<", 0x05000000), "mipsel": (8, 1, "<", 0x70001000),
       "mips": (8, 1, ">", 0x70001000)}
# What the small flash of a router has room for.
COMPRESSED_MAX, INSTALLED_MAX = 1_600_000, 3_200_000


def is_for(arch, elf):
    machine, wide, order, flags = ELF.get(arch) or ELF[arch.split("_")[0]]
    expect(elf[:4] == b"\x7fELF" and elf[4] == wide and elf[5] == {"<": 1, ">": 2}[order], f"no ELF of {arch}")
    expect(struct.unpack_from(order + "H", elf, 18)[0] == machine, f"another machine than {arch}")
    found = struct.unpack_from(order + "I", elf, 48 if wide == 2 else 36)[0]
    expect(found & flags == flags, f"flags {found:#x}, not {flags:#x}")


def untar(content):
    """{path: TarInfo, bytes}; all root's, at one time."""
    out = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar.getmembers():
            expect((member.uid, member.gid) == (0, 0), f"{member.name} is not root's")
            expect(member.isdir() or member.isfile(), f"{member.name} is neither file nor directory")
            out[member.name.removeprefix(".").removeprefix("/")] = (member, tar.extractfile(member).read() if member.isfile() else None)
    return out


def good_tree(files, arch):
    """{path: (mode, bytes)} of what is installed."""
    is_for(arch, files["usr/sbin/weft"][1])
    for path, (mode, content) in files.items():
        runs = path in ("usr/sbin/weft", "etc/init.d/weft", "usr/share/weft/keep")
        expect(mode == (0o755 if runs else 0o644), f"{path} has mode {mode:o}")
        expect(content, f"{path} is empty")
    installed = sum(len(content) for _, content in files.values())
    expect(installed <= INSTALLED_MAX, f"{installed} bytes installed")
    return installed


def ipk(arch, path):
    whole = read(path)
    outer = untar(gzip.decompress(whole))
    expect(list(outer) == ["", "debian-binary", "data.tar.gz", "control.tar.gz"], f"members {list(outer)}")
    expect(outer["debian-binary"][1] == b"2.0\n", "debian-binary")
    control = untar(gzip.decompress(outer["control.tar.gz"][1]))
    data = untar(gzip.decompress(outer["data.tar.gz"][1]))
    fields = dict(line.split(": ", 1) for line in control["control"][1].decode().splitlines())
    expect((fields["Package"], fields["Version"], fields["Architecture"]) == ("weft", f"{version()}-r1", arch), fields)
    expect("Depends" not in fields, "it stands alone")
    files = {p: (m.mode, content) for p, (m, content) in data.items() if m.isfile()}
    for conffile in control["conffiles"][1].decode().split():
        expect(conffile[1:] in files, f"conffile {conffile} is not there")
    for script in ("postinst", "prerm", "prerm-pkg"):
        member, text = control[script]
        expect(member.mode == 0o755, script)
        sh("busybox", "ash", "-n", "/dev/stdin", stdin=text.decode())
    size = good_tree(files, arch)
    expect(len(whole) <= COMPRESSED_MAX, f"{len(whole)} bytes")
    return f"{len(whole)} bytes, {size} installed"


class Adb:
    """A reader of apk-tools' format that shares nothing with its writer."""

    def __init__(self, path):
        raw = read(path)
        expect(raw[:4] == b"ADBd", "no compressed ADB")
        plain = zlib.decompress(raw[4:], -15)
        expect(plain[:8] == b"ADB.pckg", "no package")
        self.blocks, at = [], 8
        while at < len(plain):
            word, = struct.unpack_from("<I", plain, at)
            kind, size = word >> 30, word & 0x3fffffff
            self.blocks.append((kind, plain[at + 4:at + size]))
            at += -(-size // 8) * 8
        expect(at == len(plain) and [k for k, _ in self.blocks] == [0] + [2] * (len(self.blocks) - 1), "blocks")
        self.db = self.blocks[0][1]
        expect(self.db[:4] == bytes(4), "versions")

    def root(self):
        return self.slots(struct.unpack_from("<I", self.db, 4)[0], 14)

    def slots(self, value, kind):
        """Values of an object or array, from 1; beyond the last all are 0."""
        if not value:
            return [0] * 32
        at = value & 0xfffffff
        expect(value >> 28 == kind and at % 4 == 0, f"value {value:#x} is no {kind}")
        count, = struct.unpack_from("<I", self.db, at)
        found = list(struct.unpack_from(f"<{count}I", self.db, at))
        expect(found[-1] != 0, "a trailing null")
        return found + [0] * 32 if kind == 14 else found

    def blob(self, value):
        if not value:
            return b""
        size, word = {8: (1, "<B"), 9: (2, "<H"), 10: (4, "<I")}[value >> 28]
        at = value & 0xfffffff
        expect(at % size == 0, "alignment")
        length, = struct.unpack_from(word, self.db, at)
        return bytes(self.db[at + size:at + size + length])

    def number(self, value):
        return value & 0xfffffff if value >> 28 == 1 else struct.unpack_from("<I", self.db, value & 0xfffffff)[0]


def apk(arch, path, twin):
    adb = Adb(path)
    root = adb.root()
    info = adb.slots(root[1], 14)
    expect([adb.blob(info[n]) for n in (1, 2, 5, 6)] == [b"weft", f"{version()}-r1".encode(), arch.encode(), b"Apache-2.0"], "info")
    unique = adb.blob(info[3])
    zeroed = bytes(adb.db).replace(unique, bytes(20))
    expect(len(unique) == 20 and hashlib.sha256(zeroed).digest()[:20] == unique, "its id is not the hash of it")
    files, folders, data = {}, [], iter(adb.blocks[1:])
    for n, folder in enumerate(adb.slots(root[2], 13)[1:], 1):
        folder = adb.slots(folder, 14)
        folders.append(adb.blob(folder[1]))
        names = []
        for m, file in enumerate(adb.slots(folder[3], 13)[1:] if folder[3] else [], 1):
            file = adb.slots(file, 14)
            names.append(adb.blob(file[1]))
            acl = adb.slots(file[2], 14)
            expect((adb.blob(acl[2]), adb.blob(acl[3])) == (b"root", b"root"), "all is root's")
            _, block = next(data)
            content = block[8:]
            expect(struct.unpack_from("<II", block) == (n, m), f"data of {struct.unpack_from('<II', block)}, not {n}, {m}")
            expect(len(content) == adb.number(file[3]) and hashlib.sha256(content).digest() == adb.blob(file[5]), names[-1])
            files[os.path.join(folders[-1], names[-1]).decode()] = (adb.number(acl[1]), content)
        expect(names == sorted(names), "files are sorted")
    expect(next(data, None) is None and folders == sorted(folders) and folders[0] == b"", "folders are sorted, all data is used")
    size = good_tree(files, arch)
    own = "lib/apk/packages/weft."
    listed = files[own + "list"][1].decode().split()
    same = {p: f for p, f in files.items() if not p.startswith(own)}
    expect(listed == sorted("/" + p for p in same), "the list is not what is there")
    data = gzip.decompress(untar(gzip.decompress(read(twin)))["data.tar.gz"][1])
    expect(same == {p: (m.mode, c) for p, (m, c) in untar(data).items() if m.isfile()}, "ipk and apk differ")
    scripts = adb.slots(root[3], 14)
    for n in (3, 4, 7):
        sh("busybox", "ash", "-n", "/dev/stdin", stdin=adb.blob(scripts[n]).decode())
    expect(len(read(path)) <= COMPRESSED_MAX, f"{len(read(path))} bytes")
    return f"{len(read(path))} bytes, {size} installed"


def judged(path, arch):
    """The word of a real apk of version 3."""
    tool = shutil.which("apk")
    if not tool or "apk-tools 3" not in sh(tool, "--version"):
        raise Skip("needs-apk-tools-3: its own reader has no say here")
    sh(tool, "verify", "--allow-untrusted", path)
    with tempfile.TemporaryDirectory() as top:
        sh(tool, "--root", top, "--initdb", "--arch", arch, "--allow-untrusted", "--no-network", "--no-scripts", "add", path)
        expect(os.path.exists(f"{top}/usr/sbin/weft"), "not installed")
    return sh(tool, "--version").strip()


def deb(arch, path):
    with tempfile.TemporaryDirectory() as top:
        sh("dpkg-deb", "-R", path, top)
        is_for(arch, read(f"{top}/usr/sbin/weft"))
        expect(f"Architecture: {arch}\n" in read(f"{top}/DEBIAN/control").decode(), "architecture")
    return f"{os.path.getsize(path)} bytes"


def reproducible():
    """The same sources, built into packages again at another place, give the same bytes."""
    def build(**env):
        subprocess.run(["packaging/build"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **env})
    # What lies there may be of another day's executables.
    build()
    before = {p: read(p) for kind in ("ipk", "apk", "deb") for p in packages(kind).values()}
    build(TMPDIR=tempfile.gettempdir(), TZ="Asia/Tokyo", LC_ALL="C")
    for path, content in before.items():
        expect(read(path) == content, f"{path} has other bytes")
    return f"{len(before)} packages"


def cases(report):
    ipks, apks, debs = packages("ipk"), packages("apk"), packages("deb")
    for arch, path in sorted(ipks.items()):
        report.case(f"ipk-{arch}", ipk, arch, path)
    for arch, path in sorted(apks.items()):
        report.case(f"apk-{arch}", apk, arch, path, ipks.get(arch))
        if shutil.which("apk"):
            report.case(f"apk-judged-{arch}", judged, path, arch)
    for arch, path in sorted(debs.items()):
        report.case(f"deb-{arch}", deb, arch, path)
    report.case("reproducible", reproducible)
