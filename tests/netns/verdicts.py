"""What one pair of gateways must show: the oracle's answer, by counters; and many pairs, several at a time."""
import itertools
import re
import time

from pairs import (ALL, BLOCKED, RELAY_SHARE, SHORT, Meter, Tally, by_tcp, direct_possible, download, each, expect, until_direct, upload,
                   words)

COUNT = 10_000_000
# A first round of PINGs is over by then; where nothing was found until then, nothing will be.
ROUND = 1.6

CLASSES = [("none", "none"), ("double", "double"), ("full-cone", "symmetric-random"), ("address-restricted", "address-dependent"),
           ("symmetric", "address-restricted"), ("address-dependent", "symmetric"), ("symmetric-random", "symmetric-random"), (BLOCKED, BLOCKED)]


def wanted_pairs(kinds=ALL):
    every = list(itertools.product(kinds, kinds))
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
            # Ports that a NAT draws may be neighbours by chance, too.
            want = f"ours: {words(near.kind)}( with sequential ports)?, theirs: {words(far.kind)}"
            expect(peer.get("path") == "relay" and re.search(want, peer.get("note", "")), f"{near.kind}: wanted {want!r}: {peer}")
        said.append(peer["note"])
    return "; ".join(said)


def judge_blocked(net, meters, a, b, count=COUNT):
    """UDP is dead at one of them, or at both: by TCP from there to the relays, by UDP from the other, and not a byte else."""
    begin = time.monotonic()
    expect(a.reaches(b, timeout=10), f"no contact; {net.logs(a, b)}")
    first = time.monotonic() - begin
    before, tally = [m.read() for m in meters], Tally(net, a, b)
    begin = time.monotonic()
    download(a, b, count)
    upload(a, b, count)
    took = time.monotonic() - begin
    after, between = [m.read() for m in meters], tally.read()
    for end in (a, b):
        tcp, udp = (sum(now[k] - was[k] for now, was in zip(after, before) for k in (f"{proto}_i_e{end.number}", f"{proto}_o_e{end.number}"))
                    for proto in ("tcp", "udp"))
        blocked = end.kind == BLOCKED
        expect((tcp if blocked else udp) > 2 * count and (udp if blocked else tcp) < count // 100,
               f"{end.name} ({end.kind}): {tcp:,} B by TCP, {udp:,} by UDP; {net.logs(a, b)}")
        expect(by_tcp(end.agent, len(net.hosts) * blocked), f"{end.name} says {end.agent.tell('status')['relays']}")
    expect(max(max(between["direct a>b"]), max(between["direct b>a"])) < count // 100, f"{between}")
    expect(a.agent.path_to(b.name) == b.agent.path_to(a.name) == "relay", f"{a.agent.peer(b.name)}; {b.agent.peer(a.name)}")
    return f"by TCP, first byte after {first * 1000:.0f} ms, {2 * count * 8e-6 / took:.0f} Mbit/s"


def attempt(work, *args):
    """What `work` returns or raises, for a report made later."""
    try:
        return lambda detail=work(*args): detail
    except Exception as e:  # noqa: BLE001: raised where it is reported
        def fail(e=e):
            raise e
        return fail


def run_all(net, left, right, pairs, report):
    """A case for each pair of kinds, and one for their sum."""
    net.start()
    net.meter(*net.ends)
    meters = [Meter(host, **{f"e{e.number}": e.public for e in net.ends}) for host in net.hosts]

    def one(pair):
        a, b = left[pair[0]], right[pair[1]]
        return attempt(judge_blocked, net, meters, a, b) if BLOCKED in pair else attempt(judge, net, a, b)
    yes = tcp = 0
    for now in rounds(pairs):
        for (a, b), verdict in each(lambda p: (p, one(p)), now):
            passed = report.case(f"{a}.{b}", verdict)
            yes += passed and direct_possible(a, b)
            tcp += passed and BLOCKED in (a, b)
    wanted = sum(direct_possible(*p) for p in pairs)
    blocked = sum(BLOCKED in p for p in pairs)

    def total():
        said = f"{yes} of {wanted} that can be direct are, {tcp} of {blocked} without UDP go by TCP, of {len(pairs)} pairs"
        expect((yes, tcp) == (wanted, blocked), said)
        return said
    report.case("total", total)
