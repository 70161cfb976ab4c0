"""The lines that tests print, and their sum: `ok NAME detail`, `FAIL NAME detail`, `skip NAME reason`."""
import os
import sys
import time
import traceback


# Skipped with CI=true too: these need what no checkout of the project has.
ELSEWHERE = ("needs-shared-lab", "needs-kube")


class Skip(Exception):
    """This case cannot be shown here; the reason is said. With CI=true it counts as a failure, but for ELSEWHERE's."""


class Report:
    def __init__(self, theme):
        self.theme, self.counts = theme, {"ok": 0, "FAIL": 0, "skip": 0}
        self.wanted = sys.argv[1:]

    def line(self, verdict, name, detail):
        self.counts[verdict] += 1
        print(verdict, f"{self.theme}.{name}", " ".join(str(detail or "").split()), flush=True)

    def wants(self, name):
        return not self.wanted or any(w in f"{self.theme}.{name}" for w in self.wanted)

    def case(self, name, check, *args):
        """Runs `check`; what it returns is the detail, an AssertionError is the failure. True: it held."""
        if not self.wants(name):
            return False
        begin = time.monotonic()
        try:
            detail = check(*args)
        except Skip as e:
            must = os.environ.get("CI") == "true" and str(e).split(":")[0] not in ELSEWHERE
            self.line("FAIL" if must else "skip", name, e)
            return False
        except Exception as e:  # noqa: BLE001: one broken case must not hide the others
            where = " in ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)[:0:-1][:5])
            self.line("FAIL", name, f"{type(e).__name__}: {str(e)[:1500]} ({where})")
            return False
        self.line("ok", name, f"{detail or ''} [{time.monotonic() - begin:.1f} s]")
        return True

    def end(self):
        ok, failed, skipped = self.counts["ok"], self.counts["FAIL"], self.counts["skip"]
        print(f"{ok} passed, {failed} failed, {skipped} skipped", flush=True)
        return 1 if failed or not ok + skipped else 0


def expect(truth, detail):
    if not truth:
        raise AssertionError(detail)
