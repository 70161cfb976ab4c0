"""Networks of the edge in namespaces: NATs, links, faults; and the product's own processes in them."""
from . import ipv6, kernel, links
from .kernel import LabError
from .nat import DOUBLE, KINDS, behaviour
from .world import Lab, Node, Process, Site, timed, wait_for

__all__ = ["DOUBLE", "KINDS", "Lab", "LabError", "Node", "Process", "Site", "behaviour", "timed", "wait_for"]
