"""Checks of much traffic, for whichever way it goes."""
import socket
import time

from natlab.servers import pattern, pattern_sha256
from stage import ECHO, WEB, expect, fetch_sha256, many, read_all, wait_for

RSS_MAX = 8_000_000
# After a gibibyte and a thousand connections: what the allocator keeps comes on top.
RSS_MAX_AFTER_ALL = 9_000_000
# The host's own build has glibc and unwind tables, 2.5 MB of files, beside what the shipped executables have: these are
# static and of 3 MB at most (cross/gate), and more than that is not counted.
FILES_MAX = 3_000_000


def download(stage, node, count):
    stage.cluster.relay_host.meter(one=stage.one.router.address)
    got, took = fetch_sha256(node, WEB, count)
    expect(got == pattern_sha256(count), "SHA-256 differs")
    out = stage.cluster.relay_host.metered()["out_one"][1]
    expect(stage.edge1.path_to("edge-2") != "relay" or out >= count, f"only {out:,} bytes by the relay")
    return f"{count:,} bytes, SHA-256 equal, {count * 8e-6 / took:.0f} Mbit/s, {out:,} bytes out of the relay"


def upload(stage, node, count):
    begin = time.monotonic()
    with node.tcp(WEB, 80) as s:
        s.settimeout(60)
        s.sendall(f"POST /sum HTTP/1.0\r\nContent-Length: {count}\r\n\r\n".encode())
        for block in pattern(count):
            s.sendall(block)
        answer = read_all(s).split(b"\r\n\r\n", 1)[1].decode().split()
    expect(answer == [str(count), pattern_sha256(count)], f"{answer[:1]} bytes arrived, or SHA-256 differs")
    return f"{count:,} bytes, SHA-256 equal, {count * 8e-6 / (time.monotonic() - begin):.0f} Mbit/s"


def connections(stage, node, count):
    payload = b"".join(pattern(4096))
    begin = time.monotonic()
    whole = many(node, ECHO, 7001, count, payload)
    expect(whole == count, f"{whole} of {count} came back whole; {stage.logs(4)}")
    expect(stage.echo.most >= count, f"the server saw at most {stage.echo.most} at once")
    wait_for(lambda: stage.echo.open == 0, 20, what="all connections have ended at the server")
    return f"{count} at once, each with {len(payload):,} bytes, in {time.monotonic() - begin:.1f} s"


def slow_reader(stage, node):
    """A client that does not read holds nothing but its own windows: others go on, and memory stays."""
    before = [a.process.rss()[0] for a in stage.cluster.agents.values()]
    with node.tcp(WEB, 80) as s:
        s.sendall(b"GET /bytes/200000000 HTTP/1.0\r\n\r\n")
        time.sleep(3)
        got, took = fetch_sha256(node, WEB, 4 << 20)
        expect(got == pattern_sha256(4 << 20), "SHA-256 differs")
        grown = [a.process.rss()[0] - b for a, b in zip(stage.cluster.agents.values(), before)]
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    expect(max(grown) < 3_000_000, f"grown by {grown}")
    return f"another got 4 MiB in {took:.2f} s meanwhile; grown by {[g // 1024 for g in grown]} KiB"


def memory(stage, most=None):
    held = {name: agent.process.held() for name, agent in stage.cluster.agents.items()}
    rss = {name: own + min(files, FILES_MAX) for name, (own, files) in held.items()}
    said = ", ".join(f"{name} {rss[name] / 1e6:.2f} MB ({own / 1e6:.2f} its own, {files / 1e6:.2f} of files)"
                     for name, (own, files) in held.items())
    expect(all(now <= (most or RSS_MAX) for now in rss.values()), said)
    return said
