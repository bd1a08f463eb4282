"""Pairs of long-lived worker processes, a target and an initiator, that take one measurement per request.

Both sides, NIXL's worker and ours, run the same loop: batches of equal blocks that walk the region over sixteen places
at most, one thread that submits and waits. The pair that is not being measured is stopped.
"""

import json
import os

import lab

REGION = 256 << 20


class Pair:
    """A target and an initiator; `measure` runs one setting."""

    def __init__(self, target_command, initiator_command, env=None, pinned=False, target_env=None):
        """`pinned` gives each of the two processes one core of its own; `target_env` is the target's where it differs."""
        self.target = lab.Process(target_command, target_env or env, 1 if pinned else None)
        hello, _ = self.target.expect(r"^\{.*\}$")
        self.initiator = lab.Process(initiator_command, env, 0 if pinned else None)
        self.ready = self.initiator.ask(json.loads(hello.group(0)))
        self.pause()

    def pause(self):
        self.initiator.pause()
        self.target.pause()

    def resume(self):
        self.target.resume()
        self.initiator.resume()

    def measure(self, operation, block, batch, seconds):
        """One run: GB/s, latency of a batch, and CPU seconds per GB of both processes."""
        self.resume()
        try:
            with lab.Foreign([self.target, self.initiator]):
                before = self.target.cpu_s()
                run = self.initiator.ask({"operation": operation, "block": block, "batch": batch, "seconds": seconds})
                target_cpu = self.target.cpu_s() - before
        finally:
            self.pause()
        gigabytes = run["bytes"] / 1e9
        return {"gb_per_s": gigabytes / run["seconds"], "p50_us": run["p50_us"], "p99_us": run["p99_us"],
                "cpu_s_per_gb": (run["cpu_s"] + target_cpu) / gigabytes}

    def stop(self):
        for process in (self.initiator, self.target):
            process.stop()


def nixl(transports, **more):
    """NIXL over the UCX transports named, for instance "tcp,self"."""
    python = os.path.join(lab.PEERS, "nixl", "venv", "bin", "python")
    worker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "nixl_worker.py")
    env = {"UCX_TLS": transports, "NIXL_LOG_LEVEL": "ERROR", "UCX_LOG_LEVEL": "error", **more}
    if "tcp" in transports.split(","):
        env["UCX_NET_DEVICES"] = "lo"
    return Pair([python, worker, "target", str(REGION)], [python, worker, "initiator", str(REGION)], env)


# How the waiting threads wait: the initiator's caller, and the target's event loop.
WAITS = {
    "default": ({}, {}),
    "sleeping": ({"TIDEWIRE_SPIN_US": "0", "TIDEWIRE_TCP_LOOP_SPIN_US": "0"},) * 2,
    "spinning": ({"TIDEWIRE_SPIN_US": "1000000", "TIDEWIRE_TCP_LOOP_SPIN_US": "0"}, {"TIDEWIRE_TCP_LOOP_SPIN_US": "1000000"}),
}


def ours(transport, memory="engine", waits="default", pinned=False):
    """Ours over one transport; `memory` is "engine" (allocated by it) or "plain" (registered)."""
    worker = lab.release_binary("bench_worker")
    initiator_env, target_env = WAITS[waits]
    return Pair([worker, "target", str(REGION), transport, memory], [worker, "initiator", str(REGION), transport, memory],
                initiator_env, pinned, target_env)


def rounds(pairs, options, operation, block, batch):
    """Measures every pair in turn, several rounds, in alternating order: {name: [run, ...]}."""
    def take(index):
        return {name: pairs[name].measure(operation, block, batch, options.seconds) for name in lab.alternating(list(pairs), index)}

    runs = lab.by_side(lab.quiet_rounds(options.rounds, options.tries, take))
    for name in pairs:
        options.say(f"    {name}: " + ", ".join(f"{run['gb_per_s']:.3g}" for run in runs[name]) + " GB/s, p50 "
                    + ", ".join(f"{run['p50_us']:.3g}" for run in runs[name]) + " us")
    return {name: runs[name] for name in pairs}
