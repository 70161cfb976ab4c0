"""Writes packages in the ADB format of apk-tools 3 (its doc/apk-v3.5.scd and src/apk_adb.h say what stands where)."""
import hashlib
import os
import struct
import zlib

INFO = {"name": 1, "version": 2, "hashes": 3, "description": 4, "arch": 5, "license": 6, "origin": 7, "maintainer": 8,
        "url": 9, "build-time": 11, "installed-size": 12}
SCRIPT = {"post-install": 3, "pre-deinstall": 4, "post-deinstall": 5, "pre-upgrade": 6, "post-upgrade": 7}
INT, INT_32, BLOB_8, BLOB_16, BLOB_32, ARRAY, OBJECT = (n << 28 for n in (1, 2, 8, 9, 10, 13, 14))
BLOCK_ADB, BLOCK_DATA = 0, 2


def sha256(content):
    return hashlib.sha256(content).digest()


class Adb:
    """A database that grows: each method puts a value into it and gives what refers to it. Nothing is 0."""

    def __init__(self):
        self.bytes = bytearray(8)  # two versions, a reserve, and the root, which comes last
        self.known = {}

    def _put(self, content, align):
        """Values that are equal are there once."""
        if (content, align) not in self.known:
            self.bytes += bytes(-len(self.bytes) % align)
            self.known[content, align] = len(self.bytes)
            self.bytes += content
        return self.known[content, align]

    def number(self, n):
        return INT | n if n < 1 << 28 else INT_32 | self._put(struct.pack("<I", n), 4)

    def blob(self, content):
        if not content:
            return 0
        kind, size, align = next(k for k in ((BLOB_8, "<B", 1), (BLOB_16, "<H", 2), (BLOB_32, "<I", 4))
                                 if len(content) < 1 << 8 * k[2])
        return kind | self._put(struct.pack(size, len(content)) + content, align)

    def _slots(self, kind, slots):
        while slots and not slots[-1]:
            slots.pop()
        return kind | self._put(struct.pack(f"<{len(slots) + 1}I", len(slots) + 1, *slots), 4) if slots else 0

    def object(self, fields):
        """Of {number: value}."""
        return self._slots(OBJECT, [fields.get(i, 0) for i in range(1, max(fields, default=0) + 1)])

    def array(self, items):
        return self._slots(ARRAY, list(items))

    def acl(self, mode):
        return self.object({1: self.number(mode), 2: self.blob(b"root"), 3: self.blob(b"root")})

    def sealed(self, root):
        struct.pack_into("<I", self.bytes, 4, root)
        return self.bytes


def block(kind, content):
    return struct.pack("<I", kind << 30 | len(content) + 4) + content + bytes(-(len(content) + 4) % 8)


def package(about, files, scripts, time):
    """The bytes of a package without a signature. `files`: {path: (mode, content)}, all root's; `about`: of INFO."""
    db = Adb()
    values = {INFO[k]: db.number(v) if isinstance(v, int) else db.blob(v.encode()) for k, v in about.items()}
    values[INFO["installed-size"]] = db.number(sum(len(content) for _, content in files.values()) or 1)
    values[INFO["hashes"]] = unique = db.blob(b"\1" * 20)
    unique = (unique & 0xfffffff) + 1
    db.bytes[unique:unique + 20] = bytes(20)

    folders = {""}
    for path in files:
        while path := os.path.dirname(path):
            folders.add(path)
    paths, data = [], []
    for n, folder in enumerate(sorted(folders, key=str.encode), 1):
        inside = []
        for name in sorted((os.path.basename(p) for p in files if os.path.dirname(p) == folder), key=str.encode):
            mode, content = files[os.path.join(folder, name)]
            inside.append(db.object({1: db.blob(name.encode()), 2: db.acl(mode), 3: db.number(len(content)),
                                     4: db.number(time), 5: db.blob(sha256(content))}))
            if content:
                data.append(block(BLOCK_DATA, struct.pack("<2I", n, len(inside)) + content))
        paths.append(db.object({1: db.blob(folder.encode()), 2: db.acl(0o755), 3: db.array(inside)}))
    root = db.object({1: db.object(values), 2: db.array(paths),
                      3: db.object({SCRIPT[k]: db.blob(v) for k, v in scripts.items()})})
    whole = db.sealed(root)
    # The package's identity: of what it is while its place is zero.
    whole[unique:unique + 20] = sha256(whole)[:20]

    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    plain = b"ADB.pckg" + block(BLOCK_ADB, bytes(whole)) + b"".join(data)
    return b"ADBd" + deflate.compress(plain) + deflate.flush()
