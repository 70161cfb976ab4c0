"""What the themes share: the packages that packaging/build made, and commands."""
import glob
import os
import platform
import re
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PACKAGES = os.path.join(ROOT, "target", "packages")
HOST = platform.machine()


def sh(*words, check=True, env=None, stdin=None, timeout=600):
    """What it prints; its failure is an AssertionError with what it said."""
    done = subprocess.run(words, capture_output=True, text=True, input=stdin, timeout=timeout,
                          env={**os.environ, **(env or {})}, cwd=ROOT)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)} ended with {done.returncode}: {done.stdout[-800:]}{done.stderr[-800:]}")
    return done.stdout + (done.stderr if not check else "")


def version():
    with open(f"{ROOT}/Cargo.toml", encoding="utf-8") as f:
        return re.search(r'^version = "(.*)"', f.read(), re.M)[1]


def packages(kind):
    """{architecture: path}"""
    found = {}
    for path in glob.glob(f"{PACKAGES}/weft[-_]{version()}*.{kind}"):
        found[re.match(rf"weft[-_]{re.escape(version())}(?:-r\d+)?_(.*)\.{kind}", os.path.basename(path))[1]] = path
    return found


def read(path):
    with open(path, "rb") as f:
        return f.read()
