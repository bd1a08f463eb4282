"""Drives `transfer_engine_bench`, Mooncake's or ours: the same flags, the same final line.

A run starts a fresh initiator against a target that stays. CPU time is read from the middle of the transfers (a tenth of
them left out at either end), since start-up, which fills or maps gigabytes, is not what a transfer costs.
"""

import glob
import os
import re

import lab

FINAL = r"Test completed: duration ([\d.]+), batch count (\d+), throughput ([\d.]+) ?(\S*)"


def mooncake_binary():
    found = glob.glob(os.path.join(lab.PEERS, "mooncake", "venv", "lib", "python3*", "site-packages", "mooncake", "transfer_engine_bench"))
    if not found:
        raise lab.BenchError("the Mooncake wheel is missing: tests/peers/setup-mooncake.sh")
    return found[0]


class Tool:
    """One implementation's target, paused while it is not measured."""

    def __init__(self, binary, buffer_bytes, extra=()):
        self.binary, self.buffer_bytes, self.extra = binary, buffer_bytes, list(extra)
        self.env = {"GLOG_minloglevel": "0"}
        self.target = lab.Process(self._command("target", "127.0.0.1:12345"), self.env)
        found, _ = self.target.expect(r"listening on ([\d.]+:\d+)")
        self.segment = found.group(1)
        self._drain_start()
        self.target.pause()

    def _command(self, mode, name, *flags):
        return [self.binary, f"--mode={mode}", "--protocol=tcp", "--metadata_server=P2PHANDSHAKE", f"--local_server_name={name}",
                f"--buffer_size={self.buffer_bytes}", *self.extra, *flags]

    def _drain_start(self):
        """Waits until the target answers: a first, short run is thrown away."""
        self._initiate("write", 65536, 1, 1, 1)

    def _initiate(self, operation, block, batch, threads, seconds):
        initiator = lab.Process(self._command(
            "initiator", "127.0.0.1:12346", f"--segment_id={self.segment}", f"--operation={operation}", f"--block_size={block}",
            f"--batch_size={batch}", f"--threads={threads}", f"--duration={seconds}", "--report_unit=MB"), self.env)
        try:
            with lab.Foreign([self.target, initiator]), lab.Sampler([self.target, initiator]) as sampler:
                found, at = initiator.expect(FINAL, seconds + 60)
            initiator.wait()
        finally:
            initiator.stop()
        duration, batches = float(found.group(1)), int(found.group(2))
        if batches == 0:
            raise lab.BenchError(f"{self.binary} moved nothing: {initiator.text()}")
        return duration, batches * batch * block / 1e9, at, sampler

    def _persist(self, *setting):
        """A run that fails is said and taken again, twice at most."""
        for _ in range(2):
            try:
                return self._initiate(*setting)
            except lab.BenchError as error:
                print(f"    taken again: {error}", flush=True)
        return self._initiate(*setting)

    def measure(self, operation, block, batch, threads, seconds):
        self.target.resume()
        try:
            duration, gigabytes, at, sampler = self._persist(operation, block, batch, threads, seconds)
        finally:
            self.target.pause()
        cpu_per_s = sampler.cpu_per_s(at - 0.9 * duration, at - 0.1 * duration)
        return {"gb_per_s": gigabytes / duration, "cpu_s_per_gb": cpu_per_s * duration / gigabytes,
                "batch_us": duration * 1e6 * threads / (gigabytes * 1e9 / (batch * block))}

    def stop(self):
        self.target.stop()


def rounds(tools, options, operation, block, batch, threads):
    """Measures every tool in turn, several rounds, in alternating order: {name: [run, ...]}."""
    seconds = max(1, round(options.seconds))

    def take(index):
        return {name: tools[name].measure(operation, block, batch, threads, seconds) for name in lab.alternating(list(tools), index)}

    runs = lab.by_side(lab.quiet_rounds(options.rounds, options.tries, take))
    for name in tools:
        options.say(f"    {name}: " + ", ".join(f"{run['gb_per_s']:.3g}" for run in runs[name]) + " GB/s, CPU s/GB "
                    + ", ".join(f"{run['cpu_s_per_gb']:.3g}" for run in runs[name]))
    return {name: runs[name] for name in tools}


def reads_final_line(text):
    """The four fields of the final line; used by the self-test."""
    found = re.search(FINAL, text)
    return found.groups() if found else None
