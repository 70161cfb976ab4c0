"""A program's wall clock set ahead, for what expires."""
import os

from .compiled import compiled
from .kernel import LabError
from .weft import executable


def ahead(seconds):
    """Environment of such a program."""
    with open(executable(), "rb") as f:
        if b"/ld-" not in f.read(4096):
            raise LabError("the executable is linked statically: its clock cannot be set ahead")
    return {"LD_PRELOAD": os.path.abspath(compiled("clock.c", "-shared", "-fPIC")), "WEFT_LAB_AHEAD": str(seconds)}
