"""What is compared with what, and what is asked of the result. Each function is one report.

The goals are those of the project: against Mooncake's own tool over TCP, against NIXL over UCX on TCP and on one host,
against raw sockets for one small write. A goal that is missed is written down as missed.
"""

import json
import os
import subprocess
import tempfile

import bench_tool
import lab
import report
import workers
from report import OURS, Case


class Options:
    """Rounds and seconds of a run, and where the files go."""

    def __init__(self, rounds, seconds, tries, folder, command):
        self.rounds, self.seconds, self.tries, self.folder, self.command = rounds, seconds, tries, folder, command

    def say(self, text):
        print(text, flush=True)


def mooncake(options):
    """`transfer_engine_bench` of both, over loopback TCP, with the same flags."""
    buffer_bytes = 1 << 30  # the tool's default
    # The tool's default of 12 threads with 128 requests each is more than Mooncake admits in blocks of 1 MiB: it then fails.
    settings = [(4096, 128, 12, 20), (65536, 128, 12, 4), (1 << 20, 16, 4, 2), (8 << 20, 16, 4, 2),
                (65536, 16, 1, 4), (1 << 20, 16, 1, 2)]
    tools = {"Mooncake": bench_tool.Tool(bench_tool.mooncake_binary(), buffer_bytes)}
    tools[OURS] = bench_tool.Tool(lab.release_binary("transfer_engine_bench"), buffer_bytes)
    cases = []
    try:
        for operation in ("write", "read"):
            for block, batch, threads, goal in settings:
                label = f"{operation} {lab.size(block)} × {batch}, {threads} thread{'s' if threads > 1 else ''}"
                options.say(label)
                lab.wait_quiet()
                runs = bench_tool.rounds(tools, options, operation, block, batch, threads)
                cases.append(Case(label, "gb_per_s", goal, runs, cpu_goal=0.5))
    finally:
        for tool in tools.values():
            tool.stop()
    method = [
        "`transfer_engine_bench` of the PyPI wheel `mooncake-transfer-engine-non-cuda` 0.3.13.post1 and ours, same flags,",
        "target and initiator as two processes over loopback TCP, metadata `P2PHANDSHAKE`, everything else default.",
        "The peer's other processes are stopped while a side is measured.",
    ]
    report.comparison(report.Writer(options.folder, "mooncake-tcp"), "Against Mooncake's transfer_engine_bench, TCP", method,
                      options.rounds, options.command, cases, "GB/s over loopback TCP, same flags; higher is better")


SPINNING = f"{OURS}, spinning"


def _measure(options, pairs, settings):
    """Runs settings of (operation, block, batch, metric, goal) over worker pairs. Latency is judged on the spinning side."""
    cases = []
    try:
        for operation, block, batch, metric, goal in settings:
            label = f"{operation} {lab.size(block)}" + (f" × {batch}" if batch > 1 else ", one at a time")
            options.say(label)
            lab.wait_quiet()
            runs = workers.rounds(pairs, options, operation, block, batch)
            latency = metric == "p50_us"
            cases.append(Case(label + (", p50" if latency else ""), metric, goal, runs, "µs" if latency else "GB/s", not latency,
                              ours=SPINNING if latency and SPINNING in pairs else OURS))
    finally:
        for pair in pairs.values():
            pair.stop()
    return cases


def nixl(options):
    """NIXL over UCX on TCP, with both segment sizes; the better one counts."""
    pairs = {
        "NIXL": workers.nixl("tcp,self"),
        "NIXL, 64k segments": workers.nixl("tcp,self", UCX_TCP_TX_SEG_SIZE="64k", UCX_TCP_RX_SEG_SIZE="64k"),
        OURS: workers.ours("tcp"),
        SPINNING: workers.ours("tcp", waits="spinning"),
    }
    settings = [(operation, block, 16, "gb_per_s", goal) for block in (65536, 1 << 20)
                for operation, goal in (("write", 1.1), ("read", 1.5))]
    settings.append(("write", 4096, 1, "p50_us", 1.0))
    settings.append(("read", 4096, 1, "p50_us", None))
    cases = _measure(options, pairs, settings)
    method = [
        "NIXL 1.5.1 from PyPI (UCX backend on host memory, TCP), the initiator without a progress thread, the target with",
        "one, because nothing else would serve it. Both sides walk a region of 256 MiB with the same loop; one thread submits",
        "and waits. NIXL runs with UCX's default segments and with 64 KiB segments; ratios are against the better of the two.",
        "NIXL's caller polls until the transfer is done. Ours polls for some microseconds by default; \"spinning\" polls on,",
        "at both ends (`TIDEWIRE_SPIN_US`, `TIDEWIRE_TCP_LOOP_SPIN_US`), and is what the latency of one operation is judged on.",
        "Throughput is judged on the default.",
    ]
    report.comparison(report.Writer(options.folder, "nixl-tcp"), "Against NIXL over UCX, TCP", method, options.rounds,
                      options.command, cases, "loopback TCP, 256 MiB region")


def samehost(options):
    """Two processes of one host: NIXL's posix and cma, our shm and cma."""
    pairs = {
        "NIXL posix,cma": workers.nixl("posix,cma,self", NIXL_ERROR_MODE="none"),
        "Tidewire cma": workers.ours("cma", "plain"),
        OURS: workers.ours("shm"),
    }
    settings = [(operation, block, 16, "gb_per_s", 1.0) for block in (65536, 1 << 20) for operation in ("write", "read")]
    settings += [("write", 64, 1, "p50_us", 1.0), ("read", 64, 1, "p50_us", 1.0), ("write", 4096, 1, "p50_us", 1.0)]
    cases = _measure(options, pairs, settings)
    method = [
        "NIXL 1.5.1 with `UCX_TLS=posix,cma,self` (initiator without a progress thread) against our `shm` (memory that the",
        "engine allocated) and our `cma` (any registered memory), two processes over a region of 256 MiB. Ratios compare",
        "`Tidewire`, which is `shm`, with NIXL. Asked of 64-byte operations: under 2 µs on `shm`.",
    ]
    report.comparison(report.Writer(options.folder, "same-host"), "Two processes of one host", method, options.rounds,
                      options.command, cases, "same host, 256 MiB region")


def latency(options):
    """One small write over TCP against a raw ping-pong that waits in the same way."""
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "pingpong")
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pingpong.c")
        subprocess.run(["cc", "-O2", "-o", program, source], check=True)
        pairs = {"block": workers.ours("tcp", waits="sleeping", pinned=True),
                 "spin": workers.ours("tcp", waits="spinning")}
        cases = []
        try:
            for way, words in (("block", "blocking"), ("spin", "spinning")):
                for block in (64, 4096):
                    cases.append(_small_write(options, program, pairs[way], way, words, block))
        finally:
            for pair in pairs.values():
                pair.stop()
    method = [
        "One write at a time over native TCP against a raw TCP_NODELAY ping-pong (`tests/bench/pingpong.c`) over loopback.",
        "\"write\" ping-pong: the payload out and 16 bytes back, the least a one-sided write must move, and what ratios are",
        "taken against. \"echo\": the payload both ways. Blocking: both ends sleep in the kernel; spinning: both ends poll.",
        "When blocking, initiator and target have one core each, on both sides of the comparison: otherwise the scheduler",
        "decides the result by where it puts them. When spinning they are free, since our engine does not spin on one core.",
    ]
    report.comparison(report.Writer(options.folder, "small-write"), "One small write over TCP", method, options.rounds,
                      options.command, cases, "p50 of one write, loopback TCP; lower is better")


def _small_write(options, program, pair, way, words, block):
    label = f"write {lab.size(block)}, {words}"
    options.say(label)
    lab.wait_quiet()

    def raw(back):
        done = subprocess.run([program, way, str(block), str(back), str(options.seconds)], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def take(index):
        ours = {"p50_us": pair.measure("write", block, 1, options.seconds)["p50_us"]} if index % 2 else None
        runs = {"raw write": raw(16), "raw echo": raw(block)}
        runs[OURS] = ours or {"p50_us": pair.measure("write", block, 1, options.seconds)["p50_us"]}
        return runs

    runs = lab.by_side(lab.quiet_rounds(options.rounds, options.tries, take))
    for name, taken in runs.items():
        options.say(f"    {name}: " + ", ".join(f"{run['p50_us']:.3g}" for run in taken) + " us")
    return Case(label, "p50_us", 1.3, runs, "µs", higher_is_better=False, only=["raw write"])
