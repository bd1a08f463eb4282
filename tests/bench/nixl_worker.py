"""One end of a NIXL pair, run by the interpreter of NIXL's own environment (see workers.py for the harness side).

    nixl_worker.py target REGION          prints {"metadata", "address"}, then serves until its input ends
    nixl_worker.py initiator REGION       reads the target's line, then one JSON request per line

The initiator has no progress thread: the thread that waits drives UCX. The target needs its own, since nothing else
would serve it. NIXL_ERROR_MODE names UCX's error handling (shared memory has none, so there it is "none").
"""

import base64
import json
import os
import resource
import sys
import time

import numpy
from nixl_cu12._api import nixl_agent, nixl_agent_config


def say(**fields):
    print(json.dumps(fields), flush=True)


def make_agent(name, progress_thread):
    agent = nixl_agent(name, nixl_agent_config(backends=[], enable_prog_thread=progress_thread))
    parameters = dict(agent.get_plugin_params("UCX"))
    if "NIXL_ERROR_MODE" in os.environ:
        parameters["ucx_error_handling_mode"] = os.environ["NIXL_ERROR_MODE"]
    agent.create_backend("UCX", parameters)
    return agent


def register(agent, region, fill):
    memory = numpy.full(region, fill, numpy.uint8)
    agent.register_memory([(memory.ctypes.data, region, 0, "")], mem_type="DRAM")
    return memory


def serve(region):
    agent = make_agent("target", True)
    memory = register(agent, region, 7)
    say(metadata=base64.b64encode(agent.get_agent_metadata()).decode(), address=memory.ctypes.data)
    for line in sys.stdin:
        offset, length = json.loads(line)["peek"]
        say(bytes=memory[offset:offset + length].tobytes().hex())


class Initiator:
    def __init__(self, region, hello):
        self.region, self.remote = region, hello["address"]
        self.agent = make_agent("initiator", False)
        self.memory = register(self.agent, region, 9)
        name = self.agent.add_remote_agent(base64.b64decode(hello["metadata"]))
        self.peer = name.decode() if isinstance(name, bytes) else name

    def prepare(self, operation, block, batch, index):
        def descriptors(base):
            first = index * batch
            return self.agent.get_xfer_descs([(base + (first + i) * block, block, 0) for i in range(batch)], mem_type="DRAM")
        return self.agent.initialize_xfer(
            operation.upper(), descriptors(self.memory.ctypes.data), descriptors(self.remote), self.peer, b"")

    def run(self, handle):
        state = self.agent.transfer(handle)
        while state != "DONE":
            if state == "ERR":
                raise RuntimeError("transfer failed")
            state = self.agent.check_xfer_state(handle)

    def measure(self, operation, block, batch, seconds):
        """Repeats batches that walk the region, sixteen places at most, as the other side's worker does."""
        places = max(1, min(16, self.region // (block * batch)))
        handles = [self.prepare(operation, block, batch, index) for index in range(places)]
        for handle in handles:
            self.run(handle)
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = now = time.perf_counter()
        times = []
        while now - begin < seconds:
            self.run(handles[len(times) % places])
            then, now = now, time.perf_counter()
            times.append(now - then)
        after = resource.getrusage(resource.RUSAGE_SELF)
        for handle in handles:
            self.agent.release_xfer_handle(handle)
        times.sort()
        return {
            "bytes": len(times) * block * batch, "seconds": now - begin, "p50_us": times[len(times) // 2] * 1e6,
            "p99_us": times[int(len(times) * 0.99)] * 1e6,
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        }


def initiate(region):
    initiator = Initiator(region, json.loads(sys.stdin.readline()))
    initiator.memory[:8] = numpy.frombuffer(b"tidewire", numpy.uint8)
    initiator.run(initiator.prepare("write", 8, 1, 0))
    say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(**initiator.measure(request["operation"], request["block"], request["batch"], request["seconds"]))
        except RuntimeError as error:
            say(error=str(error))


if __name__ == "__main__":
    {"target": serve, "initiator": initiate}[sys.argv[1]](int(sys.argv[2]))
    os._exit(0)  # NIXL's destructors wait for peers that are gone
