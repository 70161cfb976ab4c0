"""tests/demo, once everything is installed and built."""
import argparse
import contextlib
import json
import os
import re
import sys
import time

from natlab import Lab, LabError, undo, wait_for, weft
from natlab.kernel import run
from natlab.servers import pattern_sha256
from natlab.weft import ADDRESS, Cluster, service

BULK = 100_000_000
FOREIGN = "www.outside.example"
# What must be the same afterwards; comments and packet counts left out.
MACHINE = {
    "ip netns list": ["ip", "netns", "list"], "iptables-save": ["iptables-save"], "ip link": ["ip", "-o", "link"],
    "ip route": ["ip", "route", "show", "table", "all"], "ip addr": ["ip", "-o", "addr"],
    "nft list ruleset": ["nft", "-s", "list", "ruleset"],
}


def machine(mine="-"):
    """Namespaces of other labs, which come and go meanwhile, do not count."""
    def counts(what, line):
        other = what == "ip netns list" and re.match(r"w[0-9a-f]{6}-", line) and not line.startswith(mine)
        return not line.startswith("#") and not other
    return {what: sorted(re.sub(r"\[\d+:\d+\]|(valid|preferred)_lft \S+", "", line)
                         for line in run(argv, check=False).splitlines() if counts(what, line))
            for what, argv in MACHINE.items()}


def say(text=""):
    print(text, flush=True)


def curl(node, url, *options):
    return node.run("curl", "-sS", "--fail", "--max-time", "60", *options, url, timeout=90)


def first_byte(node, url):
    """Milliseconds from the look-up of the name to the first byte of the answer."""
    return float(curl(node, url, "-o", "/dev/null", "-w", "%{time_starttransfer}")) * 1000


def look_up(node, name):
    """By the C library, as every program does."""
    ask = ("import socket, time; t = time.monotonic(); a = socket.getaddrinfo({!r}, 80, socket.AF_INET)[0][4][0];"
           "print(a, (time.monotonic() - t) * 1000)").format(name)
    address, took = node.run(sys.executable, "-c", ask).split()
    return address, float(took)


def servers(cluster):
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(__file__)), "PYTHONDONTWRITEBYTECODE": "1"}

    def serve(node, *argv):
        process = node.spawn(sys.executable, "-m", "natlab.servers", *argv, env=env, log=f"{cluster.lab.folder}/{node.name}.log")
        wait_for(lambda: "ready" in process.text() or not process.alive(), what=f"server at {node.name}")
        if not process.alive():
            raise LabError(f"server at {node.name}: {process.text()}")

    serve(cluster.dns_host, "dns", "0.0.0.0", "53", json.dumps({FOREIGN: cluster.dns_host.address}))
    for i, site in enumerate(cluster.sites.values(), 1):
        serve(site.web, "web", "0.0.0.0", "8080", f"the web server of site {i}")


def build(cluster):
    """Bundles, files and processes."""
    one, two = cluster.sites.values()
    services = [service("web", "10.96.0.10", 80, [(two.web.address, "edge-2")], target=8080),
                service("tools", "10.96.0.20", 80, [(one.web.address, "edge-1")], target=8080)]
    cluster.relay()
    cluster.edge("edge-1", services=services)
    cluster.edge("edge-2", files=services)
    for site in (one, two):
        for node in (site.gateway, site.client):
            node.resolver(ADDRESS)
    cluster.start()


def evidence(cluster, bulk):
    """Which way the bytes of `bulk()` went, by counters of the kernel: not by what the agents say of themselves."""
    one, two = cluster.sites.values()
    relay = cluster.relay_host
    relay.meter(one=one.router.address, two=two.router.address)
    one.router.meter(relay=relay.address, direct=two.router.address)
    done = bulk()
    at_relay, at_nat = relay.metered(), one.router.metered()
    return done, {"into_relay": at_relay["in_two"][1], "out_of_relay": at_relay["out_one"][1],
                  "direct": at_nat["in_direct"][1]}


def judged(seen):
    """The way that most bytes went; "none" where the counters do not account for all of them."""
    relayed = min(seen["into_relay"], seen["out_of_relay"])
    if relayed + seen["direct"] < BULK:
        return "none"
    return "relay" if relayed > seen["direct"] else "direct"


def show(cluster):
    """Everything that the demo is to show; its figures."""
    (one, two), agents = cluster.sites.values(), cluster.agents
    web, tools = "http://web.shop.svc.cluster.local", "http://tools.shop.svc.cluster.local"
    figures = {"name": {}, "answers": {}, "first_byte_ms": {}}

    say("\n• the name")
    for where, node in (("gateway 1", one.gateway), ("LAN client 1", one.client)):
        address, took = look_up(node, "web.shop.svc.cluster.local")
        say(f"  {where}: web.shop.svc.cluster.local is {address} ({took:.1f} ms)")
        figures["name"][where] = address
        if address != "10.96.0.10":
            raise AssertionError(f"{where}: wrong address {address}")
    say("  " + agents["edge-1"].say("resolve", "web.shop.svc.cluster.local").strip().replace("\n", "\n  "))
    address, _ = look_up(one.client, FOREIGN)
    say(f"  LAN client 1: {FOREIGN}, a name of the outside world, is {address}")
    if address != cluster.dns_host.address:
        raise AssertionError(f"{FOREIGN}: wrong address {address}")

    say("\n• the answer of the other site's server")
    begin = time.monotonic()
    figures["first_byte_ms"]["cold"] = round(first_byte(one.gateway, web), 1)
    wait_for(lambda: all(agents[f"edge-{i}"].path_to(f"edge-{3 - i}") == "direct" for i in (1, 2)), 10, 0.002,
             "both gateways have a direct path")
    figures["direct_ms"] = round((time.monotonic() - begin) * 1000, 1)
    say(f"  from the first request to the direct path, as both gateways say: {figures['direct_ms']:.1f} ms")
    for where, node, url, wanted in (
            ("gateway 1", one.gateway, web, "site 2"), ("LAN client 1", one.client, web, "site 2"),
            ("gateway 2", two.gateway, tools, "site 1"), ("LAN client 2", two.client, tools, "site 1"),
            ("gateway 2, its own", two.gateway, web, "site 2")):
        answer = curl(node, url).strip()
        say(f"  {where}: curl {url}: {answer}")
        figures["answers"][where] = answer
        if f"web server of {wanted} " not in answer:
            raise AssertionError(f"{where}: not the answer of {wanted}: {answer}")

    say("\n• time to the first byte, the look-up of the name included")
    for where, node in (("gateway", one.gateway), ("client", one.client)):
        figures["first_byte_ms"][where] = round(sorted(first_byte(node, web) for _ in range(9))[4], 1)
    say(f"  first request, with the handshake {figures['first_byte_ms']['cold']:.1f} ms; then, medians of 9:"
        f" gateway 1 {figures['first_byte_ms']['gateway']:.1f} ms, LAN client 1 {figures['first_byte_ms']['client']:.1f} ms")

    say(f"\n• {BULK // 1_000_000} MB from site 2 to the LAN client of site 1")

    def bulk():
        begin = time.monotonic()
        total = run(["ip", "netns", "exec", one.client.ns, "sh", "-c",
                     f"curl -sS --fail --max-time 300 {web}/bytes/{BULK} | sha256sum"], timeout=310)
        return total.split()[0] == pattern_sha256(BULK), time.monotonic() - begin
    (whole, took), seen = evidence(cluster, bulk)
    if not whole:
        raise AssertionError("the bytes did not arrive as they were sent")
    figures["bulk"] = {"bytes": BULK, "sha256_equal": whole, "mbit_s": round(BULK * 8e-6 / took, 1)}
    say(f"  SHA-256 equal, {figures['bulk']['mbit_s']:.0f} Mbit/s")

    say("\n• weft peers, at gateway 1")
    say("  " + agents["edge-1"].say("peers").rstrip().replace("\n", "\n  "))
    path = agents["edge-1"].path_to("edge-2")
    figures["path"], figures["counted"] = path, seen
    say(f"  the kernel's counters say: {judged(seen)} ({seen['into_relay']:,} bytes into the relay from site 2,"
        f" {seen['out_of_relay']:,} out of it to site 1, {seen['direct']:,} from NAT to NAT)")
    if not path == judged(seen) == "direct":
        raise AssertionError(f"the agent says {path}, the counters say {judged(seen)}; both NATs let a direct path through")

    say("\n• memory (RSS) after that")
    figures["rss_bytes"] = {name: agent.process.rss()[0] for name, agent in agents.items()}
    for name, rss in figures["rss_bytes"].items():
        say(f"  {name:8} {rss / 1e6:.1f} MB")
    figures["executable_bytes"] = os.path.getsize(weft.executable())
    say(f"  the executable has {figures['executable_bytes'] / 1e6:.1f} MB on disk")
    return figures


def invite(cluster):
    one, two = (site for site in cluster.sites.values())
    agent = cluster.agents["edge-1"]
    enter = f"ip netns exec {one.client.ns}"
    say(f"""
It runs on. To try:
  {enter} curl http://web.shop.svc.cluster.local
  ip netns exec {two.client.ns} curl http://tools.shop.svc.cluster.local
  {weft.executable()} peers --socket {agent.socket}
  {weft.executable()} status --socket {agent.socket}
  less {agent.path} {agent.log}
  ip netns exec {cluster.relay_host.ns} bash        (a shell on the relay)
To stop it and remove everything:
  tests/demo --stop""")


def stop():
    prefixes = undo.kept()
    for prefix in prefixes:
        undo.stop(prefix)
        say(f"• removed {prefix}")
    if not prefixes:
        say("nothing is running")


def main():
    parser = argparse.ArgumentParser(prog="tests/demo")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--stop", action="store_true")
    parser.add_argument("--prepared", type=int, default=0, help="seconds that installing and building took")
    options = parser.parse_args()
    if options.stop:
        return stop()
    undo.sweep()
    before, begin = machine(), time.monotonic()
    problem, figures, code, lab, cluster = None, {}, 0, None, None
    try:
        lab = Lab()
        say(f"• an internet, a relay and two sites behind port-restricted NATs, in namespaces {lab.prefix}-*")
        cluster = Cluster(lab)
        servers(cluster)
        say("• bundles by `weft ca`, configuration, and three processes: relay-1, edge-1, edge-2")
        build(cluster)
        figures = show(cluster)
    except (AssertionError, LabError, TimeoutError, OSError) as e:
        problem, code = str(e), 1
        say(f"\nIt did not work: {problem}")
        for agent in cluster.agents.values() if cluster else ():
            say(f"\n--- the log of {agent.name}\n{agent.tail(30)}")
    except SystemExit as e:  # the lab's handler of signals
        problem, code = "interrupted", e.code
        say("\n• interrupted")
    if options.keep and problem is None:
        invite(cluster)
        lab.ledger.keep()
    elif lab:
        lab.close()
        after = machine(lab.prefix)
        changed = [what for what in MACHINE if before[what] != after[what]]
        figures["clean"] = not changed
        if changed:
            problem, code = problem or f"not as before: {', '.join(changed)}", code or 1
            for what in changed:
                say(f"{what}: before {before[what]}, after {after[what]}")
        else:
            say(f"\n• removed: {', '.join(MACHINE)} are as before")
    figures.update(ok=problem is None, seconds=round(time.monotonic() - begin, 1), prepared_seconds=options.prepared)
    if problem:
        figures["problem"] = problem
    say(json.dumps({"path": figures.pop("path", None), **figures}))
    return code


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
