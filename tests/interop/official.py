"""An official Mooncake engine that does what its standard input says: one JSON list per line, one JSON value back.

What the engine itself prints goes to the standard error.
"""
import ctypes
import json
import os
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from mooncake.engine import TransferEngine, TransferNotify, TransferOpcode

engine = TransferEngine()
buffers = {}


def start(name, metadata):
    code = engine.initialize(name, metadata, "tcp", "")
    assert code == 0, code
    return engine.get_rpc_port()


def register(length):
    buffer = ctypes.create_string_buffer(length)
    address = ctypes.addressof(buffer)
    buffers[address] = buffer
    assert engine.register_memory(address, length) == 0
    return address


def load(address, path):
    """Fills memory from a file."""
    with open(path, "rb") as file:
        data = file.read()
    ctypes.memmove(address, data, len(data))


def dump(address, length, path):
    """Writes memory to a file."""
    with open(path, "wb") as file:
        file.write(ctypes.string_at(address, length))


def notes():
    return [[note.name, note.msg] for note in engine.get_notifies()]


def write_with_notify(name, local, remote, length, note, message):
    return engine.transfer_sync(name, local, remote, length, TransferOpcode.Write, TransferNotify(note, message))


def background(direction, name, local, remote, lengths):
    submit = getattr(engine, "batch_transfer_async_" + direction)
    batch = submit(name, local, remote, lengths)
    return engine.get_batch_transfer_status([batch]) if batch else "not submitted"


calls = {
    "start": start,
    "register": register,
    "load": load,
    "dump": dump,
    "notes": notes,
    "write": engine.transfer_sync_write,
    "read": engine.transfer_sync_read,
    "batch_write": engine.batch_transfer_sync_write,
    "batch_read": engine.batch_transfer_sync_read,
    "background": background,
    "write_with_notify": write_with_notify,
    "probe": engine.send_probe,
    "first_buffer": engine.get_first_buffer_address,
}

for line in sys.stdin:
    name, *arguments = json.loads(line)
    answers.write(json.dumps(calls[name](*arguments)) + "\n")
    answers.flush()
os._exit(0)
