"""Processes, CPU accounting and statistics of the benchmarks (standard library only).

A measurement never runs alone on a shared machine, so every run notes what the other processes used meanwhile. CPU time
is user plus system of every thread of a process, from /proc/<pid>/stat, in ticks of 10 ms.
"""

import atexit
import ctypes
import json
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import threading
import time

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CORES = os.cpu_count() or 1
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TARGET = os.path.join(ROOT, os.environ.get("CARGO_TARGET_DIR", "target"))
PEERS = os.environ.get("TIDEWIRE_PEERS_DIR", os.path.join(ROOT, ".cache", "peers"))

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
NOISE_LIMIT = 0.10  # of the machine, used by other processes during a round


class BenchError(RuntimeError):
    """A measurement that could not be taken; the text says why."""


def release_binary(name):
    """Path of one of our release binaries or examples."""
    for folder in ("release", os.path.join("release", "examples")):
        path = os.path.join(TARGET, folder, name)
        if os.access(path, os.X_OK):
            return path
    raise BenchError(f"{name} is not built: make bench builds it")


def process_cpu_s(pid):
    """User plus system seconds of a live process, 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def machine_busy_s():
    """CPU seconds that the whole machine has spent on work, stolen time included."""
    with open("/proc/stat", encoding="ascii") as stat:
        ticks = [int(field) for field in stat.readline().split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def _before_exec(core):
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if core is not None:
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})


class Process:
    """A child whose output is read line by line; it dies with the harness."""

    live = []

    def __init__(self, command, env=None, core=None):
        """`core` confines the child to the n-th core that this process may use."""
        self.command = command
        self.lines = queue.Queue()
        self.tail = []
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            bufsize=1, env={**os.environ, **(env or {})}, preexec_fn=lambda: _before_exec(core))
        self.pid = self.child.pid
        Process.live.append(self)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.child.stdout:
            self.tail = self.tail[-40:] + [line.rstrip("\n")]
            self.lines.put((time.monotonic(), line.rstrip("\n")))
        self.lines.put((time.monotonic(), None))

    def expect(self, pattern, timeout_s=60):
        """The first line from here on that matches: (match, when it came)."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                when, line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise BenchError(f"{self.name()}: no /{pattern}/ within {timeout_s} s; last output: {self.text()}") from None
            if line is None:
                raise BenchError(f"{self.name()} ended without /{pattern}/; last output: {self.text()}")
            found = re.search(pattern, line)
            if found:
                return found, when

    def ask(self, request, timeout_s=120):
        """Sends one JSON line, returns the JSON line that answers it."""
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        found, _ = self.expect(r"^\{.*\}$", timeout_s)
        reply = json.loads(found.group(0))
        if "error" in reply:
            raise BenchError(f"{self.name()}: {reply['error']}")
        return reply

    def name(self):
        return os.path.basename(self.command[0])

    def text(self):
        return " | ".join(self.tail[-6:])

    def pause(self):
        """Stops the process, so that a peer that polls does not take CPU from the side being measured."""
        self.child.send_signal(signal.SIGSTOP)

    def resume(self):
        self.child.send_signal(signal.SIGCONT)

    def cpu_s(self):
        return process_cpu_s(self.pid)

    def wait(self, timeout_s=30):
        try:
            return self.child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.name()} does not end; last output: {self.text()}") from None

    def stop(self):
        if self in Process.live:
            Process.live.remove(self)
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGCONT)
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(5)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        self._reader.join(2)
        for pipe in (self.child.stdin, self.child.stdout):
            pipe.close()


@atexit.register
def _stop_all():
    for process in list(Process.live):
        process.stop()


class Sampler:
    """CPU time of processes over time, to be cut to any window afterwards."""

    def __init__(self, processes, every_s=0.02):
        self.samples = []
        self._processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(every_s,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self, every_s):
        while not self._stop.wait(every_s):
            self.samples.append((time.monotonic(), [process.cpu_s() for process in self._processes]))

    def cpu_per_s(self, begin, end):
        """CPU seconds per second of all processes together between two moments."""
        inside = [sample for sample in self.samples if begin <= sample[0] <= end and all(sample[1])]
        if len(inside) < 5:
            raise BenchError("the run was too short for its CPU time to be read")
        (first_at, first), (last_at, last) = inside[0], inside[-1]
        return (sum(last) - sum(first)) / (last_at - first_at)


class Foreign:
    """Share of the machine that processes other than ours used during a run."""

    shares = []

    def __init__(self, processes):
        self._processes = processes

    def __enter__(self):
        self._own = sum(process.cpu_s() for process in self._processes) + time.process_time()
        self._busy, self._at = machine_busy_s(), time.monotonic()
        return self

    def add(self, process):
        self._processes.append(process)

    def __exit__(self, *_):
        own = sum(process.cpu_s() for process in self._processes) + time.process_time() - self._own
        busy, wall = machine_busy_s() - self._busy, time.monotonic() - self._at
        Foreign.shares.append(max(0.0, busy - own) / (CORES * wall))


def quiet_rounds(count, tries, take):
    """`take(index)` once per round; a round in which others used more than NOISE_LIMIT of the machine is taken again, at
    most `tries` times, and the quietest is kept."""
    kept = []
    for index in range(count):
        best = None
        for _ in range(tries):
            begin = len(Foreign.shares)
            result = take(index)
            shares = Foreign.shares[begin:]
            del Foreign.shares[begin:]
            noise = max(shares, default=0.0)
            if best is None or noise < best[0]:
                best = (noise, result, shares)
            if noise <= NOISE_LIMIT:
                break
            wait_quiet()
        kept.append(best[1])
        Foreign.shares.extend(best[2])
    return kept


def by_side(rounds):
    """[{side: run}, ...] as {side: [run, ...]}"""
    return {side: [taken[side] for taken in rounds] for side in rounds[0]}


def alternating(names, index):
    """The names, in the opposite order in every other round."""
    return list(names) if index % 2 == 0 else list(reversed(names))


def wait_quiet(limit=0.15, patience_s=20):
    """Waits until the machine was less than `limit` busy for half a second, at most `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        busy, at = machine_busy_s(), time.monotonic()
        time.sleep(0.5)
        if (machine_busy_s() - busy) / (CORES * (time.monotonic() - at)) < limit:
            return True
    return False


def summary(values):
    """(median, smallest, largest)"""
    return statistics.median(values), min(values), max(values)


def size(count):
    """Bytes in the largest binary unit that divides them: 64 KiB."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return f"{count} B"


def machine():
    """What the numbers were taken on."""
    model = "unknown CPU"
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
        for line in info:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    with open("/proc/meminfo", encoding="ascii") as info:
        memory_gib = int(info.readline().split()[1]) / (1 << 20)
    kernel = os.uname()
    virtual = " (virtual machine)" if _hypervisor() else ""
    return f"{model}, {CORES} cores{virtual}, {memory_gib:.0f} GiB, Linux {kernel.release} {kernel.machine}"


def _hypervisor():
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
        return any(line.startswith("flags") and " hypervisor" in line for line in info)


def commit():
    """Short commit of the checkout, with + when it has changes."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False).stdout.strip()
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")
