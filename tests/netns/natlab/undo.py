"""What a lab made, written down before it is made, so that it can be removed: at the end, after a failure, on Ctrl-C,
and by the next lab where this one was killed."""
import atexit
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import threading

from .kernel import end_process, run, started_at

LEDGERS = "/run/weft-lab"
NETNS_CONF = "/etc/netns"


class Ledger:
    """Things made by one lab. Each is noted first and made afterwards."""

    def __init__(self, kept=False):
        sweep()
        self.prefix = "w" + secrets.token_hex(3)
        self.path, self.lock = f"{LEDGERS}/{self.prefix}.json", threading.Lock()
        self.things = {"owner": [os.getpid(), started_at(os.getpid())], "kept": kept,
                       "processes": [], "namespaces": [], "folders": []}
        self._write()
        _open.append(self)
        _arm()

    def note(self, kind, thing):
        with self.lock:
            self.things[kind].append(thing)
            self._write()

    def keep(self):
        """From now on the end of this process removes nothing: `stop` does."""
        self.things["kept"] = True
        self._write()
        _open.remove(self)

    def undo(self):
        if self in _open:
            _open.remove(self)
        with _uninterrupted():
            _remove(self.path, self.things)

    def _write(self):
        # The last lab of another run takes the folder with it, also between two calls here.
        for _ in range(100):
            os.makedirs(LEDGERS, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                with open(self.path + ".new", "w", encoding="utf-8") as f:
                    json.dump(self.things, f)
                os.replace(self.path + ".new", self.path)
                return
        raise OSError(f"{LEDGERS} does not stay")


def stop(prefix):
    """Removes a lab that was kept. False: there is none of that name."""
    path = f"{LEDGERS}/{prefix}.json"
    things = _read(path)
    if things is None:
        return False
    _remove(path, things)
    return True


def kept():
    """Prefixes of the labs that were left running on purpose."""
    return [name.removesuffix(".json") for name in _ledgers() if (_read(f"{LEDGERS}/{name}") or {}).get("kept")]


def sweep():
    """Removes labs whose owner was killed before it could."""
    for name in _ledgers():
        path = f"{LEDGERS}/{name}"
        things = _read(path)
        if things and not things["kept"] and started_at(things["owner"][0]) != things["owner"][1]:
            print(f"lab: removing what a killed run left: {name}", file=sys.stderr)
            _remove(path, things)


def _ledgers():
    with contextlib.suppress(FileNotFoundError):
        return sorted(n for n in os.listdir(LEDGERS) if n.endswith(".json"))
    return []


def _read(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def _remove(path, things):
    for pid, start in reversed(things["processes"]):
        end_process(pid, start)
    there = {line.split()[0] for line in run(["ip", "netns", "list"]).splitlines() if line.strip()}
    for name in reversed(things["namespaces"]):
        if name in there:
            for pid in run(["ip", "netns", "pids", name], check=False).split():
                end_process(int(pid), started_at(int(pid)), patience=0.5)
            run(["ip", "netns", "del", name], check=False)
    for folder in reversed(things["folders"]):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (path, path + ".new"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)
    for folder in (LEDGERS, NETNS_CONF):
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # only an empty one goes


_open = []
_armed = False


def _arm():
    global _armed
    if not _armed:
        _armed = True
        atexit.register(_undo_all)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, _on_signal)


def _on_signal(signum, _frame):
    # Once is enough: a second Ctrl-C must not cut the clean-up short.
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)
    raise SystemExit(128 + signum)


def _undo_all():
    for ledger in list(_open):
        ledger.undo()


@contextlib.contextmanager
def _uninterrupted():
    """Ignores the signals; masking would not do, since another thread may take them for the main one."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
