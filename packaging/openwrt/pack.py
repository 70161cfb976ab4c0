"""Packages for OpenWrt without its SDK: pack.py ipk|apk WEFT ARCHITECTURE VERSION OUTPUT

ipk is what opkg takes, up to 24.10; apk the ADB format of apk-tools 3, from 25.12 on. The same input gives the same
bytes: the time is SOURCE_DATE_EPOCH."""
import gzip
import io
import os
import re
import sys
import tarfile

import adb

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
NAME, LICENSE, SECTION = "weft", "Apache-2.0", "net"
DESCRIPTION = "The network of a Kubernetes edge cluster in one small static executable"
MAINTAINER = "weft <weft@localhost>"
CONFFILES = ["/etc/config/weft"]
# OpenWrt's own, as its build system writes them: they enable and start what is in /etc/init.d.
POSTINST = """#!/bin/sh
[ "${IPKG_NO_SCRIPT}" = "1" ] && exit 0
[ -s ${IPKG_INSTROOT}/lib/functions.sh ] || exit 0
. ${IPKG_INSTROOT}/lib/functions.sh
"""
PRERM = """#!/bin/sh
[ -s ${IPKG_INSTROOT}/lib/functions.sh ] || exit 0
. ${IPKG_INSTROOT}/lib/functions.sh
"""


def epoch():
    return int(os.environ["SOURCE_DATE_EPOCH"])


def read(*path):
    with open(os.path.join(*path), "rb") as f:
        return f.read()


# Tables of one string each; other tables have lists.
PAIRS = ("balancer.egress",)


def keys():
    """What each key of weft.toml takes, by its default there: `table key kind`, a line each."""
    table, out = "", []
    for line in read(ROOT, "config", "weft.toml").decode().splitlines():
        if found := re.match(r"#?\[\[?(\w+)\]\]?$", line):
            table = found[1]
        elif found := re.match(r"#(\w+) = (.+)$", line):
            default = found[2]
            kind = "pairs" if f"{table}.{found[1]}" in PAIRS else \
                "list" if default[0] == "[" else "map" if default[0] == "{" else "string" if default[0] == '"' else \
                "bool" if default in ("true", "false") else "number"
            out.append(f"{table} {found[1]} {kind}\n")
    return "".join(out).encode()


def files(weft):
    """{path: (mode, content)}, sorted by path."""
    found = {"usr/sbin/weft": (0o755, read(weft)), "usr/share/weft/keys": (0o644, keys()),
             "usr/share/weft/weft.toml": (0o644, read(ROOT, "config", "weft.toml"))}
    top = os.path.join(HERE, "root")
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            inside = os.path.relpath(path, top)
            content = read(path)
            found[inside] = (0o755 if content.startswith(b"#!") else 0o644, content)
    return dict(sorted(found.items()))


def directories(paths):
    """Every directory above these, sorted."""
    out = set()
    for path in paths:
        while path := os.path.dirname(path):
            out.add(path)
    return sorted(out)


def tar(entries, folders=()):
    """A tar of (path, mode, content), in order, all root's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as out:
        def add(path, mode, kind, content=b""):
            info = tarfile.TarInfo(path)
            info.mode, info.type, info.size, info.mtime = mode, kind, len(content), epoch()
            info.uname = info.gname = "root"
            out.addfile(info, io.BytesIO(content))
        add("./", 0o755, tarfile.DIRTYPE)
        for folder in folders:
            add(f"./{folder}/", 0o755, tarfile.DIRTYPE)
        for path, mode, content in entries:
            add(f"./{path}", mode, tarfile.REGTYPE, content)
    return buffer.getvalue()


def zipped(content):
    return gzip.compress(content, 9, mtime=0)


def ipk(weft, arch, version):
    content = files(weft)
    data = tar([(path, *what) for path, what in content.items()], directories(content))
    control = f"""Package: {NAME}
Version: {version}
Section: {SECTION}
License: {LICENSE}
Maintainer: {MAINTAINER}
SourceDateEpoch: {epoch()}
Architecture: {arch}
Installed-Size: {len(data)}
Description: {DESCRIPTION}
"""
    scripts = {
        "conffiles": (0o644, "".join(f"{path}\n" for path in CONFFILES).encode()),
        "control": (0o644, control.encode()),
        "postinst": (0o755, f"{POSTINST}default_postinst $0 $@\n".encode()),
        "prerm": (0o755, f"{PRERM}default_prerm $0 $@\n".encode()),
        "prerm-pkg": (0o755, read(HERE, "scripts", "leave")),
    }
    members = [("debian-binary", 0o644, b"2.0\n"), ("data.tar.gz", 0o644, zipped(data)),
               ("control.tar.gz", 0o644, zipped(tar([(name, *what) for name, what in scripts.items()])))]
    return zipped(tar(members))


def apk(weft, arch, version):
    content = files(weft)
    info = "lib/apk/packages/" + NAME
    listed = sorted(f"/{path}" for path in content)
    content[info + ".conffiles"] = (0o644, "".join(f"{path}\n" for path in CONFFILES).encode())
    content[info + ".conffiles_static"] = (0o644, "".join(
        f"{path} {adb.sha256(content[path[1:]][1]).hex()}\n" for path in CONFFILES).encode())
    content[info + ".list"] = (0o644, "".join(f"{path}\n" for path in listed).encode())
    begin = f'{POSTINST}export root="${{IPKG_INSTROOT}}"\nexport pkgname="{NAME}"\n'
    scripts = {
        "post-install": f"{begin}add_group_and_user\ndefault_postinst\n",
        # Its start does nothing where an agent runs, which is the one from before.
        "post-upgrade": f'{begin}export PKG_UPGRADE=1\nadd_group_and_user\ndefault_postinst\n'
                        '[ -n "$root" ] || /etc/init.d/weft restart\n',
        "pre-deinstall": f'{PRERM}export root="${{IPKG_INSTROOT}}"\nexport pkgname="{NAME}"\n'
                         + read(HERE, "scripts", "leave").decode() + "default_prerm\n",
    }
    about = {"name": NAME, "version": version, "description": DESCRIPTION, "arch": arch, "license": LICENSE,
             "origin": NAME, "maintainer": MAINTAINER, "build-time": epoch()}
    return adb.package(about, content, {k: v.encode() for k, v in scripts.items()}, epoch())


def main(argv):
    if len(argv) != 5 or argv[0] not in ("ipk", "apk"):
        sys.exit(__doc__)
    made = {"ipk": ipk, "apk": apk}[argv[0]](*argv[1:4])
    with open(argv[4] + ".new", "wb") as f:
        f.write(made)
    os.replace(argv[4] + ".new", argv[4])


if __name__ == "__main__":
    main(sys.argv[1:])
