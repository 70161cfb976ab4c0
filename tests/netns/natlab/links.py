"""One link between two namespaces: made, impaired, cut, mended."""
import time

from . import kernel
from .compiled import compiled
from .kernel import LabError


class Link:
    """A veth pair from a node (`child`) up to its router, gateway or the core (`parent`)."""

    def __init__(self, child, child_dev, parent, parent_dev, parent_address):
        self.child, self.child_dev = child, child_dev
        self.parent, self.parent_dev = parent, parent_dev
        self.parent_address = parent_address
        self.shims = []
        # One packet of the kernel is one packet on the wire: a burst of 64 KiB would be lost or counted as one.
        kernel.ip(parent.ns,
                  f"link add {parent_dev} type veth peer name {child_dev} netns {child.ns}",
                  f"link set {parent_dev} gso_max_segs 1 up")
        kernel.ip(child.ns, f"link set {child_dev} gso_max_segs 1 up")

    def ends(self):
        """(sending node and device, receiving node and device), up first."""
        child, parent = (self.child, self.child_dev), (self.parent, self.parent_dev)
        return {"up": (child, parent), "down": (parent, child)}

    def impair(self, delay=0.0, jitter=0.0, loss=0.0, rate=0.0, queue=100.0, late=0.0, late_by=10.0, way="both"):
        """`delay`, `jitter` (order is kept) and `queue` in ms, `loss` in percent, `rate` in Mbit/s; `late` percent come
        `late_by` ms late, out of order; each direction has its own. Rate alone is done by tbf, loss alone by nft; the rest by the shim."""
        self.clear()
        for name, ((node, device), far) in self.ends().items():
            if way not in ("both", name):
                continue
            if delay or jitter or late or (loss and rate):
                self._shim(node, device, delay, jitter, loss, rate, queue, late, late_by)
            elif rate:
                burst = max(3200, int(rate * 1e6 / 8 * 0.005))
                self._tc(node, f"qdisc add dev {device} root tbf rate {int(rate * 1000)}kbit burst {burst} latency {queue:g}ms")
            elif loss:
                # Where frames arrive: a drop on the way out would be told to the sending program.
                self._ingress(far, "loss", f"numgen random mod 1000000 < {int(loss * 10000)} drop")

    def most(self, size):
        """IP packets above `size` vanish, both ways, and nobody is told; 0: none."""
        for _, far in self.ends().values():
            self._ingress(far, "most", size and f"ip length > {size} drop")

    def lose(self, percent):
        """So much is lost of what comes, each way, and all else about the link stays as it is; 0: nothing."""
        for _, far in self.ends().values():
            self._ingress(far, "lose", percent and f"numgen random mod 1000000 < {int(percent * 10000)} drop")

    def clear(self):
        for shim in self.shims:
            shim.end(1.0)
        self.shims = []
        for (node, device), _ in self.ends().values():
            for qdisc in ("clsact", "root"):
                self._tc(node, f"qdisc del dev {device} {qdisc}", check=False)
            self._ingress((node, device), "loss", None)

    def blackhole(self, way="both"):
        """Frames vanish; nobody is told."""
        for name, (_, far) in self.ends().items():
            if way in ("both", name):
                self._ingress(far, "hole", "drop")

    def carrier_down(self):
        """The cable is pulled: the child sees NO-CARRIER."""
        self.parent.ip(f"link set {self.parent_dev} down")

    def mend(self):
        """Undoes `blackhole` and `carrier_down`."""
        for _, far in self.ends().values():
            self._ingress(far, "hole", None)
        self.parent.ip(f"link set {self.parent_dev} up")

    @staticmethod
    def _ingress(end, label, rule):
        node, device = end
        table = f"table netdev {label}_{device.replace('-', '_')}"
        text = f"{table}\ndelete {table}\n"
        if rule:
            text += f'{table} {{\n chain in {{ type filter hook ingress device "{device}" priority 0;\n  {rule}\n }}\n}}\n'
        kernel.nft(node.ns, text)

    @staticmethod
    def _tc(node, line, check=True):
        kernel.run(["tc", "-n", node.ns, *line.split()], check=check)

    def _shim(self, node, device, delay, jitter, loss, rate, queue, late, late_by):
        tap = f"i{device}"[:15]
        # Each has its own: an earlier one's log says that it was ready.
        log = f"{node.lab.folder}/shim-{node.name}-{device}-{time.monotonic_ns()}.log"
        numbers = [int(delay * 1000), int(jitter * 1000), int(loss * 10000), int(rate * 1000), int(queue * 1000),
                   int(late * 10000), int(late_by * 1000)]
        shim = node.spawn(compiled("shim.c"), device, tap, *map(str, numbers), log=log)
        self.shims.append(shim)
        from .world import wait_for
        wait_for(lambda: "ready" in shim.text() or not shim.alive(), what=f"shim on {node.name}/{device}")
        if not shim.alive():
            raise LabError(f"shim on {node.name}/{device}: {shim.text().strip()}")
        self._tc(node, f"qdisc add dev {device} clsact")
        self._tc(node, f"filter add dev {device} egress protocol all u32 match u32 0 0 action mirred egress redirect dev {tap}")
