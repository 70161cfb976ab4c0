"""A program's wall clock set ahead, for what expires; and a disk that is slow."""
import os

from .compiled import compiled
from .kernel import LabError
from .weft import executable


def _before(source, **environment):
    with open(executable(), "rb") as f:
        if b"/ld-" not in f.read(4096):
            raise LabError(f"the executable is linked statically: {source} cannot stand before its libc")
    return {"LD_PRELOAD": os.path.abspath(compiled(source, "-shared", "-fPIC")), **environment}


def ahead(seconds):
    """Environment of such a program."""
    return _before("clock.c", WEFT_LAB_AHEAD=str(seconds))


def slow_disk(seconds):
    """Environment of a program whose fsyncs take so long."""
    return _before("fsync.c", WEFT_LAB_FSYNC_MS=str(int(seconds * 1000)))
