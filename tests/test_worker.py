"""`python -m fdg_keras.worker`, before it serves: above all what it refuses."""

import json
import platform
import socket
import subprocess
import sys

import pytest
from worker_processes import ENVIRONMENT

from fdg_keras import worker

TWO = "127.0.0.1:2222,127.0.0.1:2223"


def refusal(monkeypatch, *arguments, config=None):
    """What it says when it is started so."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(SystemExit, match=r"Received: ") as caught:
        worker.main(arguments)
    return str(caught.value)


def test_no_cluster(monkeypatch):
    assert "TF_CONFIG to be a JSON object" in refusal(monkeypatch)


@pytest.mark.parametrize("config", ["{", "[]", "worker"])
def test_no_json(monkeypatch, config):
    said = refusal(monkeypatch, config=config)
    assert "TF_CONFIG to be a JSON object" in said
    assert config in said


@pytest.mark.parametrize(
    "config", ["{}", '{"cluster": {"ps": ["a:1"]}}', '{"cluster": 3}']
)
def test_no_workers(monkeypatch, config):
    said = refusal(monkeypatch, config=config)
    assert "Expected a cluster with a job 'worker'" in said


def test_no_address(monkeypatch):
    assert "'host:port'" in refusal(monkeypatch, "--cluster", "one", "--task=0")


@pytest.mark.parametrize("task", [[], ["--task=2"], ["--task=-1"]])
def test_no_task(monkeypatch, task):
    said = refusal(monkeypatch, "--cluster", TWO, *task)
    assert "Expected the task of this worker, 0 to 1" in said


@pytest.mark.parametrize("task", ['"worker"', "1", '["worker", 0]'])
def test_a_task_that_is_none(monkeypatch, task):
    config = f'{{"cluster": {{"worker": ["127.0.0.1:1"]}}, "task": {task}}}'
    said = refusal(monkeypatch, config=config)
    assert 'Expected "task" in TF_CONFIG' in said


def test_the_flag_comes_before_the_configuration(monkeypatch):
    config = {
        "cluster": {"worker": TWO.split(",")},
        "task": {"type": "chief", "index": 0},
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    given = worker._parser().parse_args(["--task=1"])
    assert worker._choose_task(given)[1] == 1


def test_a_chief(monkeypatch):
    config = (
        '{"cluster": {"worker": ["127.0.0.1:2222"], "chief": ["a:1"]},'
        ' "task": {"type": "chief", "index": 0}}'
    )
    said = refusal(monkeypatch, config=config)
    assert "A chief is no worker" in said


def test_another_machine_can_reach_it(monkeypatch):
    """Unless it is told that this is meant so."""
    said = refusal(monkeypatch, "--cluster=10.0.0.2:2222", "--task=0")
    assert "no authentication" in said
    assert "--allow_network" in said


def test_an_unknown_host():
    with pytest.raises(SystemExit, match=r"^fdg_keras\.worker: "):
        worker.main(["--cluster", "no-such-host.invalid:2222", "--task", "0"])


def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refusal(monkeypatch, f"--cluster=127.0.0.1:{port}", "--task=0")
    assert f"port {port} is taken" in said


@pytest.mark.slow
def test_help_says_that_there_is_no_authentication():
    done = subprocess.run(
        [sys.executable, "-m", "fdg_keras.worker", "--help"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert "neither authentication nor encryption" in done.stdout
    assert "private network" in done.stdout


_FAULTS = """
import ctypes
import resource
import sys
import threading
from fdg_keras import worker

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = [ctypes.c_void_p]
size = 12 * 2**20
faults = []

def work():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [libc.malloc(size) for _ in range(3)]
        for block in blocks:
            libc.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        faults.append(after - before)

if sys.argv[1] == "kept":
    worker._keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*faults)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other libraries have no mallopt"
)
def test_memory_of_messages_is_kept_for_the_next():
    """Three blocks of 12 MiB are taken from the system once, not each time."""
    first, *_, last = _faults("kept")
    assert first > 0
    assert last <= first / 100
    # Else glibc takes them again and again.
    first, *_, last = _faults("as it is")
    assert last > first / 10


def _faults(how):
    found = subprocess.run(
        [sys.executable, "-c", _FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
    )
    return map(int, found.stdout.split())
