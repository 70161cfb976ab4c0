"""Takes .pdr out of an ELF executable: LLVM writes it for MIPS (32 bytes a function, for debuggers of the past), nothing
loads it, and no strip that knows MIPS is on every machine. Any other file stays as it is. trim.py FILE"""
import os
import struct
import sys

NULL, NOBITS, ALLOC = 0, 8, 2


def trimmed(old):
    """The bytes without it; None where there is none."""
    wide, order = old[4] == 2, "<" if old[5] == 1 else ">"
    shoff, = struct.unpack_from(order + ("Q" if wide else "I"), old, 40 if wide else 32)
    entry, count, names_at = struct.unpack_from(order + "3H", old, 58 if wide else 46)
    layout = struct.Struct(order + ("IIQQQQIIQQ" if wide else "10I"))
    sections = [list(layout.unpack_from(old, shoff + i * entry)) for i in range(count)]
    names = sections[names_at][4]

    def name(section):
        start = names + section[0]
        return old[start:old.index(b"\0", start)]

    if not any(name(s) == b".pdr" for s in sections):
        return None
    loose = [s for s in sections if s[1] != NULL and not s[2] & ALLOC]
    # What is loaded comes first in the file, and stays where it is.
    end = max(s[4] + (0 if s[1] == NOBITS else s[5]) for s in sections if s[2] & ALLOC)
    if any(s[4] < end for s in loose):
        raise SystemExit("trim.py: a section that is not loaded lies among those that are")
    new, gone = bytearray(old[:end]), [s for s in sections if name(s) == b".pdr"]
    for section in loose:
        if section in gone:
            section[1:] = [NULL] + [0] * 8  # the entry stays: others are known by their number
            continue
        new += bytes(-len(new) % max(section[8], 1))
        body = old[section[4]:section[4] + section[5]]
        section[4] = len(new)
        new += body
    new += bytes(-len(new) % 8)
    struct.pack_into(order + ("Q" if wide else "I"), new, 40 if wide else 32, len(new))
    for section in sections:
        new += layout.pack(*section)
    return bytes(new)


if __name__ == "__main__":
    path = sys.argv[1]
    with open(path, "rb") as f:
        result = trimmed(f.read())
    if result is not None:
        with open(path + ".new", "wb") as f:
            f.write(result)
        os.chmod(path + ".new", os.stat(path).st_mode & 0o777)
        os.replace(path + ".new", path)
