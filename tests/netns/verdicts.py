"""What one pair of gateways must show: the oracle's answer, by counters; and many pairs, several at a time."""
import itertools
import time

from pairs import ALL, RELAY_SHARE, SHORT, Tally, direct_possible, download, each, expect, until_direct, upload, words

COUNT = 10_000_000
# A first round of PINGs is over by then; where nothing was found until then, nothing will be.
ROUND = 1.6

CLASSES = [("none", "none"), ("double", "double"), ("full-cone", "symmetric-random"), ("address-restricted", "address-dependent"),
           ("symmetric", "address-restricted"), ("address-dependent", "symmetric"), ("symmetric-random", "symmetric-random")]


def wanted_pairs():
    every = list(itertools.product(ALL, ALL))
    if not SHORT:
        return every
    return [p for p in every if "port-restricted" in p or p in CLASSES]


def rounds(pairs):
    """In each no site is twice: then the counters of a site are those of its one pair."""
    left = list(pairs)
    while left:
        now, used = [], set()
        for a, b in left:
            if not {(0, a), (1, b)} & used:
                now.append((a, b))
                used |= {(0, a), (1, b)}
        left = [p for p in left if p not in now]
        yield now


def judge(net, a, b, count=COUNT):
    """First contact, both ways, from NONE to where the oracle says; then what the counters say of `count` bytes each way."""
    possible, begin = direct_possible(a.kind, b.kind), time.monotonic()
    expect(a.reaches(b, timeout=10), f"no contact; {net.logs(a, b)}")
    first = time.monotonic() - begin
    took = until_direct(a, b, 5.0 if possible else ROUND - first)
    after = f"direct after {(first + took) * 1000:.0f} ms" if took is not None else "by relay"
    tally = Tally(net, a, b)
    download(a, b, count)
    down = tally.read()
    tally = Tally(net, a, b)
    upload(a, b, count)
    up = tally.read()
    said = [after]
    for name, seen, way, back in (("down", down, "b>a", "a>b"), ("up", up, "a>b", "b>a")):
        relay, direct = max(seen[f"relay {way}"]), seen[f"direct {way}"]
        if possible:
            expect(min(direct) >= count * (1 - RELAY_SHARE) and relay < count * RELAY_SHARE and max(seen[f"relay {back}"]) < count * RELAY_SHARE,
                   f"{name}: {seen}; {after}; {net.logs(a, b)}")
        else:
            expect(min(seen[f"relay {way}"]) >= count and max(direct) < count // 100, f"{name}: {seen}; {net.logs(a, b)}")
        said.append(f"{name} {relay / count:.2%} by relay, {direct[1]:,} B between the NATs")
    if not possible:
        for near, far in ((a, b), (b, a)):
            peer = near.agent.peer(far.name)
            want = f"ours: {words(near.kind)}, theirs: {words(far.kind)}"
            expect(peer.get("path") == "relay" and want in peer.get("note", ""), f"{near.kind}: wanted {want!r}: {peer}")
        said.append(peer["note"])
    return "; ".join(said)


def attempt(*args):
    """What `judge` returns or raises, for a report made later."""
    try:
        return lambda detail=judge(*args): detail
    except Exception as e:  # noqa: BLE001: raised where it is reported
        def fail(e=e):
            raise e
        return fail


def run_all(net, left, right, pairs, report):
    """A case for each pair of kinds, and one for their sum."""
    net.start()
    net.meter(*net.ends)
    yes = 0
    for now in rounds(pairs):
        done = each(lambda p: (p, attempt(net, left[p[0]], right[p[1]])), now)
        for (a, b), verdict in done:
            yes += report.case(f"{a}.{b}", verdict) and direct_possible(a, b)
    wanted = sum(direct_possible(*p) for p in pairs)

    def total():
        expect(yes == wanted, f"{yes} of {wanted} that can be direct are")
        return f"{yes} of {wanted} that can be direct are, of {len(pairs)} pairs"
    report.case("total", total)
