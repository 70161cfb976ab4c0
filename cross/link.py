#!/usr/bin/env python3
"""rustc's linker for cross/build: zig links and says how it called lld, which is called so once more, with flags that
zig's own command does not take. WEFT_TRIPLE: the target; WEFT_LLD: the flags."""
import os
import shutil
import subprocess
import sys

CALL = "ld.lld "


def main(argv):
    wrapper = os.environ["CARGO_TARGET_" + os.environ["WEFT_TRIPLE"].upper().replace("-", "_") + "_LINKER"]
    done = subprocess.run([wrapper, *argv], env={**os.environ, "ZIG_VERBOSE_LINK": "1"}, stderr=subprocess.PIPE, text=True)
    calls = [line for line in done.stderr.splitlines() if line.startswith(CALL)]
    sys.stderr.write("".join(line + "\n" for line in done.stderr.splitlines() if line not in calls))
    if done.returncode:
        return done.returncode
    if not calls:
        sys.exit("link.py: zig does not say how it links; another version of it?")
    # The last one: before it may be those of zig's own libraries, where they had to be built. It puts blanks between the
    # arguments and quotes none: a path with a blank fails here, and not in silence.
    arguments = calls[-1][len(CALL):].split()
    python = os.environ.get("CARGO_ZIGBUILD_PYTHON_PATH") or (not shutil.which("zig") and "python3")
    zig = [python, "-m", "ziglang"] if python else ["zig"]
    return subprocess.run([*zig, "ld.lld", *arguments, *os.environ["WEFT_LLD"].split()]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
