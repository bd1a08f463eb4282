"""What an item more and what idling costs: registration, segments, peers; CPU of engines that do nothing."""

import json
import time

import chart
import lab
import report
import workers
from chart import number

IDLE_SECONDS = 5.0
IDLE_GOAL = 0.01  # of one core

ITEMS = {
    "register": ("registering a buffer", "unregistering it", [100, 1000, 10000]),
    "segments": ("opening a segment", "opening it again", [10, 100, 1000]),
    "peers": ("first write to a peer (connects)", "second write", [8, 64, 512]),
}


def scale(options):
    """Cost per item as their number grows."""
    worker = lab.release_binary("bench_worker")
    series, lines = {}, ["| item | count | µs each | then | µs each |", "|---|---:|---:|---|---:|"]
    for what, (first, second, counts) in ITEMS.items():
        taken = {count: [] for count in counts}
        for index in range(options.rounds):
            order = counts if index % 2 == 0 else counts[::-1]
            process = lab.Process([worker, "cost", what, *map(str, order)])
            with lab.Foreign([process]):
                for count in order:
                    found, _ = process.expect(r"^\{.*\}$", 300)
                    taken[count].append(json.loads(found.group(0)))
                process.wait()
            process.stop()
        series[first] = [(count, lab.summary([run["us_per_item"] for run in taken[count]])) for count in counts]
        for count in counts:
            once = report.spread([run["us_per_item"] for run in taken[count]])
            again = report.spread([run["more_us_per_item"] for run in taken[count]])
            lines.append(f"| {first} | {count} | {once} | {second} | {again} |")
            options.say(f"    {first}, {count}: {once} us; {second}: {again} us")
    method = [
        "One engine in one process, each count in a fresh engine. Buffers are 4 KiB and registered one by one with `p2p`",
        "discovery. Segments and peers are one target engine under as many loopback addresses, each a segment of its own with",
        "its own descriptor, link and connections; target and initiator share the process, so the figures hold both ends.",
    ]
    writer = report.Writer(options.folder, "scale")
    writer.write(".svg", chart.lines("Cost per item over their number", "one process, loopback TCP; flat is good", "items",
                                     "microseconds per item", series))
    growth = [f"* {name}: {number(points[-1][1][0] / points[0][1][0])} × from {points[0][0]} to {points[-1][0]} items"
              for name, points in series.items()]
    writer.write(".md", "\n".join(report.header("Cost per item", method, options.rounds, options.command) + lines
                                  + ["", "Growth of the median cost per item:", "", *growth, "", writer.picture(".svg"), ""]))


def _idle_share(processes):
    """CPU of the processes over the idle time, as a share of one core."""
    time.sleep(1.0)
    before, at = sum(process.cpu_s() for process in processes), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return (sum(process.cpu_s() for process in processes) - before) / (time.monotonic() - at)


def idle(options):
    """CPU of connected engines that have nothing to do."""
    makers = {
        "NIXL target, with its progress thread": lambda: workers.nixl("tcp,self"),
        f"{report.OURS} tcp": lambda: workers.ours("tcp"),
        f"{report.OURS} shm": lambda: workers.ours("shm"),
    }
    rounds = min(options.rounds, 5)
    taken = {}
    for name, make in makers.items():
        pair = make()
        pair.resume()
        # A connection that was used is what an idle server has.
        pair.initiator.ask({"operation": "write", "block": 4096, "batch": 1, "seconds": 0.2})
        processes = [pair.target] if name.startswith("NIXL") else [pair.target, pair.initiator]
        taken[name] = [100 * _idle_share(processes) for _ in range(rounds)]
        pair.stop()
        options.say(f"    {name}: {report.spread(taken[name])} % of a core")
    lines = ["| engines | % of one core | goal | met |", "|---|---:|---:|---|"]
    for name, values in taken.items():
        ours = name.startswith(report.OURS)
        met = ("yes" if lab.summary(values)[0] < 100 * IDLE_GOAL else "**no**") if ours else ""
        lines.append(f"| {name} | {report.spread(values)} | {'< 1' if ours else ''} | {met} |")
    method = [
        "Two processes that were connected and moved data, then had nothing to do for 5 s. For ours the CPU of both engines",
        "together; for NIXL that of the target alone, whose progress thread polls. 0 means less than one tick of 10 ms.",
    ]
    lab.Foreign.shares.clear()
    writer = report.Writer(options.folder, "idle")
    writer.write(".md", "\n".join(report.header("CPU of idle engines", method, rounds, options.command) + lines + [""]))
