"""A process that looks after workers while Python cannot."""

import pathlib
import socket
import subprocess
import sys
import time

from worker_processes import ENVIRONMENT

# Holds Python's lock for good, as TensorFlow does while it waits.
CHIEF = """
import ctypes, os, socket, sys
from fdg_keras.lookout import Lookout
end = ("127.0.0.1", int(sys.argv[1]))
found = socket.create_connection(end)
lookout = Lookout([end], 1.0)
print(lookout._process.pid, flush=True)
libc = ctypes.PyDLL(None)
print(libc.recv(found.fileno(), ctypes.create_string_buffer(1), 1, 0))
"""


def chief(port):
    return subprocess.Popen(
        [sys.executable, "-c", CHIEF, str(port)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )


def is_there(number):
    status = pathlib.Path(f"/proc/{number}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until_gone(number):
    deadline = time.monotonic() + 20
    while is_there(number):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_who_holds_the_lock_is_cut_off_from_who_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = chief(server.getsockname()[1])
        number = int(process.stdout.readline())
        loaded = pathlib.Path(f"/proc/{number}/maps").read_text()
        assert process.communicate(timeout=60)[0] == "0\n"
        assert "tensorflow" not in loaded
        wait_until_gone(number)


def test_it_ends_with_a_chief_that_is_killed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = chief(server.getsockname()[1])
        number = int(process.stdout.readline())
        assert is_there(number)
        process.kill()
        process.communicate(timeout=60)
        wait_until_gone(number)
