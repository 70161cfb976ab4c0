"""The lab's small C programs, compiled on first use and kept under the build folder by the hash of their source."""
import hashlib
import os
import shutil
import subprocess
import tempfile

from .kernel import LabError

HERE = os.path.dirname(os.path.abspath(__file__))


def compiled(source, *flags, compiler=None):
    """Path of the program made from `natlab/SOURCE`, or from another path."""
    path = os.path.join(HERE, source)
    with open(path, "rb") as f:
        name = f"{os.path.basename(source).removesuffix('.c')}-{hashlib.sha256(f.read() + ' '.join([*flags, compiler or '']).encode()).hexdigest()[:12]}"
    target = os.environ.get("CARGO_TARGET_DIR") or os.path.join(HERE, "..", "..", "..", "target")
    folder = os.path.join(os.path.abspath(target), "netns")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        folder = tempfile.gettempdir()
    out = os.path.join(folder, name)
    if not os.path.exists(out):
        compiler = compiler or shutil.which("cc") or shutil.which("gcc")
        if not compiler:
            raise LabError(f"{source} needs a C compiler (apt-get install gcc libc6-dev)")
        fresh = f"{out}.{os.getpid()}"
        done = subprocess.run([compiler, "-O2", "-Wall", "-Wextra", *flags, "-o", fresh, path], capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"{compiler} {path}: {done.stderr}")
        os.replace(fresh, out)  # several labs may compile at once
    return out
