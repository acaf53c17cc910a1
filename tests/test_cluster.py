"""Stages on workers that are processes of their own: the same, and faults."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import cluster_chief
import numpy as np
import pytest
from worker_processes import ENVIRONMENT, Workers

from fdg_keras import sockets

CHIEF = pathlib.Path(cluster_chief.__file__)
ROOT = CHIEF.parent.parent
#: After so many seconds without a sign of life a worker is lost.
TIMEOUT_S = 6.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool():
    with Workers(2) as workers:
        yield workers


@pytest.fixture
def workers(pool):
    """Two that run, or are about to."""
    pool.start()
    yield pool
    for process in pool.processes:
        process.send_signal(signal.SIGCONT)


def run_chief(job, addresses, timeout=240, **settings):
    """Runs a chief to its end; returns what it has said."""
    done = subprocess.run(
        [
            *(sys.executable, str(CHIEF), job, ",".join(addresses)),
            json.dumps(settings),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        errors="replace",  # gRPC's messages may have anything in them.
        timeout=timeout,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, said, done.stderr


def train(workers, tmp_path, **settings):
    """Has a chief train in two stages on two workers."""
    into = str(tmp_path / "values.npz")
    settings = {"timeout_s": TIMEOUT_S, "into": into, **settings}
    code, said, err = run_chief("train", workers.addresses, **settings)
    assert code == 0, err
    assert said[-1]["threads"] == ["MainThread"]
    with np.load(into) as found:
        return said[-1], [found[name] for name in found.files]


@pytest.fixture(scope="module")
def after():
    """The weights and slots after so many epochs, in this process."""
    found = {}

    def values_after(epochs):
        if epochs not in found:
            model = cluster_chief.make_model()
            if epochs:
                cluster_chief.fit(model, ["CPU:0"] * 2, epochs=epochs)
            else:
                model.optimizer.build(model.trainable_variables)
            found[epochs] = cluster_chief.values(model)
        return found[epochs]

    return values_after


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        np.testing.assert_array_equal(a, b)


# -- The same as in one process ------------------------------------------------


def test_the_same_as_in_one_process(tmp_path):
    with Workers(4) as workers:
        code, said, err = run_chief(
            "compare", workers.addresses, 200, folder=str(tmp_path)
        )
        assert code == 0, err
        assert workers.end() == [0] * 4
    connected, *trainings, read, rest = said
    assert connected["devices"] == [
        f"/job:worker/replica:0/task:{task}/device:CPU:0" for task in range(4)
    ]
    assert [one["stages"] for one in trainings] == [2, 3, 4]
    for one in trainings:
        assert one["weights"]
        assert one["histories"]
    # The second stage's worker and the chief read nothing.
    assert read["read_on"] == [[connected["devices"][0]]] * 2
    assert read["weights"]
    assert read["histories"]
    assert rest["evaluate"][0] == rest["evaluate"][1]
    assert rest["predict"]
    assert rest["checkpoint"]
    assert [one[0] for one in rest["planned"]] == connected["devices"][:2]
    assert all(min(one[1:]) > 0 for one in rest["planned"])
    assert len(rest["passes"]) == 3
    assert all(rest["passes"])
    # The model is home again.
    assert rest["home"] == ["/job:localhost/replica:0/task:0/device:CPU:0"]


def test_times_of_passes_are_by_the_clock_of_the_chief(workers, tmp_path):
    """Which is a quarter of an hour behind."""
    code, said, err = run_chief(
        "behind", workers.addresses, by_s=900, folder=str(tmp_path)
    )
    assert code == 0, err
    begun, ended = said[-1]["span"]
    assert len(said[-1]["passes"]) == 2
    for passes in said[-1]["passes"]:
        assert passes
        for *_, start, end in passes:
            assert begun < start < end < ended


def test_a_worker_says_what_it_is_and_what_to_do(workers):
    wait_for(lambda: "Ctrl-C or SIGTERM ends it." in workers.output(1))
    said = workers.output(1)
    assert "fdg_keras worker, task 1 of 2" in said
    assert workers.addresses[1] in said
    assert "fdg_keras.connect_to_cluster()" in said


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- Faults: what the user sees, and how soon ----------------------------------


def assert_lost(told, stage, task, why):
    assert told["error"] == "ConnectionError"
    assert "A worker was lost." in told["message"]
    assert "`BackupAndRestore`" in told["message"]
    assert f"task {task} of job 'worker'" in told["message"]
    assert f"which runs stage {stage}: " in told["message"]
    assert re.search(why, told["message"]), told["message"]


def test_a_worker_is_killed_and_training_resumed(workers, tmp_path, after):
    backup = str(tmp_path / "backup")
    process = workers.processes[0].pid
    told, found = train(
        workers,
        tmp_path,
        backup=backup,
        fault=(f"kill -KILL {process}", 2, 1),
    )
    assert_lost(told, 0, 0, "Connection refused")
    assert told["seconds"] < 10
    # What belongs together: not what the stages happened to have.
    assert "end of the last epoch" in told["notes"][0]
    assert_same(found, after(2))
    workers.start()
    told, found = train(workers, tmp_path, backup=backup)
    assert told["epochs"] == [2, 3]
    assert_same(found, after(4))


def test_a_worker_is_frozen(workers, tmp_path, after):
    process = workers.processes[1].pid
    told, found = train(
        workers, tmp_path, fault=(f"kill -STOP {process}", 1, 2)
    )
    assert_lost(told, 1, 1, "no sign of life for . s")
    assert told["seconds"] < 30
    assert_same(found, after(1))


def test_a_worker_is_frozen_while_python_waits_for_it(workers):
    """TensorFlow tells it of functions, and lets no other thread run."""
    code, said, err = run_chief(
        "tracing",
        workers.addresses,
        timeout_s=TIMEOUT_S,
        command=f"kill -STOP {workers.processes[1].pid}",
    )
    assert code == 0, err
    assert said[-1]["error"] == "UnavailableError"
    assert TIMEOUT_S < said[-1]["seconds"] < 30
    assert said[-1]["threads"] == ["MainThread"]


def test_a_worker_is_frozen_while_another_computes(workers):
    """Which may wait for it, without the chief."""
    code, said, err = run_chief(
        "waiting",
        workers.addresses,
        timeout_s=TIMEOUT_S,
        command=f"kill -STOP {workers.processes[1].pid}",
    )
    assert code == 0, err
    assert_lost(said[-1], 1, 1, "no sign of life for . s")
    assert "task 0" not in said[-1]["message"]
    assert TIMEOUT_S < said[-1]["seconds"] < 30
    assert said[-1]["threads"] == ["MainThread"]


def test_a_worker_is_told_to_end(workers, tmp_path, after):
    """In the first epoch: the model is as it was before."""
    process = workers.processes[0]
    # A process may be dead while its last thread still has the sockets.
    listens = f"bash -c ': < /dev/tcp/{workers.addresses[0].replace(':', '/')}'"
    command = f"kill -TERM {process.pid}; while {listens}; do sleep 0.05; done"
    told, found = train(workers, tmp_path, fault=(command, 0, 2))
    assert process.wait(20) == 0
    assert_lost(told, 0, 0, "Connection refused")
    assert_same(found, after(0))


@pytest.mark.parametrize("number", ["STOP", "KILL"])
def test_a_worker_is_lost_while_the_model_is_at_home(
    workers, tmp_path, after, number
):
    """It is a `ConnectionError`, and the model can be saved."""
    into = str(tmp_path / "model.keras")
    code, said, err = run_chief(
        "between",
        workers.addresses,
        timeout_s=TIMEOUT_S,
        into=into,
        command=f"kill -{number} {workers.processes[1].pid}",
    )
    assert code == 0, err
    errors = said[-1]["errors"]
    assert [name for name, _ in errors] == ["ConnectionError"] * 4
    assert all("task 1 of job 'worker'" in message for _, message in errors)
    # What is known of it is not waited for again.
    assert said[-1]["seconds"] < 30
    assert said[-1]["threads"] == ["MainThread"]
    saved = cluster_chief.keras.models.load_model(into)
    assert_same(cluster_chief.values(saved), after(1))


def test_a_worker_is_restarted_while_the_model_is_at_home(workers, tmp_path):
    """Another process answers there, which knows nothing of this one."""
    killed, again = tmp_path / "killed", tmp_path / "again"

    def restart():
        wait_for(killed.exists, 200)
        workers.kill(1)
        workers.start()
        wait_for(lambda: "SIGTERM ends it." in workers.output(1))
        again.touch()

    other = threading.Thread(target=restart)
    other.start()
    code, said, err = run_chief(
        "between",
        workers.addresses,
        timeout_s=TIMEOUT_S,
        into=str(tmp_path / "model.keras"),
        command=f"touch {killed}; until [ -e {again} ]; do sleep 0.05; done",
    )
    other.join()
    assert code == 0, err
    errors = said[-1]["errors"]
    assert [name for name, _ in errors] == ["ConnectionError"] * 4
    for _, message in errors:
        assert "task 1 of job 'worker'" in message
        assert "task 0 of job 'worker'" not in message
        assert message.endswith("it was restarted")
    assert said[-1]["threads"] == ["MainThread"]


def test_a_chief_is_killed_and_another_one_trains(workers, tmp_path, after):
    """Workers outlive it, and keep nothing that would disturb the next."""
    before = [process.pid for process in workers.processes]
    code, _, _ = run_chief(
        "train", workers.addresses, fault=("kill -KILL $CHIEF", 1, 1)
    )
    assert code == -signal.SIGKILL
    told, found = train(workers, tmp_path)
    assert told["epochs"] == [0, 1, 2, 3]
    assert_same(found, after(4))
    assert [process.pid for process in workers.processes] == before
    assert not any(process.poll() for process in workers.processes)


def test_ctrl_c(workers, tmp_path):
    """It is Ctrl-C, and workers are as good as before."""
    told, _ = train(workers, tmp_path, fault=("kill -INT $CHIEF", 1, 1))
    assert told["error"] == "KeyboardInterrupt"
    assert any("Interrupted in this epoch" in note for note in told["notes"])
    assert not any(process.poll() for process in workers.processes)


def test_a_worker_does_not_answer_from_the_begin(workers):
    wait_for(lambda: "SIGTERM ends it." in workers.output(1))
    os.kill(workers.processes[1].pid, signal.SIGSTOP)
    code, said, _ = run_chief("train", workers.addresses, timeout_s=1)
    assert code == 0
    assert said[0]["error"] == "ConnectionError"
    assert "Task 1 of job 'worker' does not answer" in said[0]["message"]
    assert workers.addresses[1] in said[0]["message"]


JOINS = """
import os, signal, sys
import tensorflow as tf
import fdg_keras
addresses, frozen, moment = sys.argv[1:]
frozen = int(frozen)
join = tf.config.experimental_connect_to_cluster
def joins(*arguments, **named):
    if moment == "before":
        os.kill(frozen, signal.SIGSTOP)
    join(*arguments, **named)
    if moment == "after":
        os.kill(frozen, signal.SIGSTOP)
tf.config.experimental_connect_to_cluster = joins
try:
    fdg_keras.connect_to_cluster({"worker": addresses.split(",")}, 3)
except ConnectionError as error:
    print(error)
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_worker_freezes_while_it_is_joined(workers, moment):
    """TensorFlow lets no other thread run then."""
    wait_for(lambda: "SIGTERM ends it." in workers.output(1))
    done = subprocess.run(
        [
            *(sys.executable, "-c", JOINS, ",".join(workers.addresses)),
            *(str(workers.processes[1].pid), moment),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
    )
    assert "could not join the cluster" in done.stdout, done.stderr
    assert "task 1 of job 'worker'" in done.stdout
    assert done.returncode == 0


def test_a_worker_has_another_version(tmp_path):
    """Told by the worker, whatever the chief believes."""
    package = tmp_path / "keras_of_another_release.py"
    package.write_text(
        "import runpy, keras\n"
        "keras.__version__ = '3.99.0'\n"
        "runpy.run_module('fdg_keras.worker', run_name='__main__')\n"
    )
    port = sockets.free_port()
    other = subprocess.Popen(
        [
            *(sys.executable, str(package)),
            *("--cluster", f"127.0.0.1:{port}", "--task", "0"),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        code, said, _ = run_chief("train", [f"127.0.0.1:{port}"])
    finally:
        other.kill()
        other.wait(20)
    assert code == 0
    assert said[0]["error"] == "ValueError"
    assert "must have the same versions" in said[0]["message"]
    assert "task 0 of job 'worker'" in said[0]["message"]
    assert "3.99.0" in said[0]["message"]


NETWORK = pathlib.Path(__file__).with_name("cluster_network.sh")


@pytest.mark.skipif(
    not shutil.which("ip")
    or subprocess.run(["unshare", "-Urn", "true"]).returncode != 0,
    reason="needs iproute2 and network namespaces",
)
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("chief", r"task 1 .* no sign of life for . s"),
        # Both ways are cut, and either may be noticed first.
        ("workers", r"task 0 .*task (\d) gets nothing from task (?!\1)\d"),
    ],
)
def test_the_network_is_cut(tmp_path, after, fault, why):
    """Three machines, which are network namespaces here."""
    into = str(tmp_path / "values.npz")
    settings = {
        "timeout_s": TIMEOUT_S,
        "into": into,
        "fault": (f"eval $CUT_{fault}", 1, 1),
    }
    done = subprocess.run(
        [
            *("unshare", "-Urn", "--fork", "--kill-child"),
            *("bash", str(NETWORK), sys.executable, str(CHIEF)),
            json.dumps(settings),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.get("error") == "ConnectionError", done.stderr
    assert re.search(why, told["message"])
    assert told["seconds"] < 30
    assert told["threads"] == ["MainThread"]
    with np.load(into) as found:
        assert_same([found[name] for name in found.files], after(1))


@pytest.mark.skipif(
    pathlib.Path(sys.prefix) != ROOT / ".venv",
    reason="would install all into .venv",
)
def test_the_script(tmp_path):
    """Two workers, the digits, and nobody is left behind."""
    done = subprocess.run(
        ["bash", "scripts/cluster.sh", "--smoke", f"--model_dir={tmp_path}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (workers,) = re.findall("^Workers: (.*)$", done.stdout, re.MULTILINE)
    for task, address in enumerate(workers.split(",")):
        assert f"/job:worker/replica:0/task:{task}/" in done.stdout
        end = ("127.0.0.1", sockets.split_address(address)[1])
        reason = sockets.unanswered(end, 1.0)
        assert isinstance(reason, ConnectionRefusedError)
    assert re.search(r"^fdg_keras.Trainer +\d", done.stdout, re.MULTILINE)


def test_workers_end_cleanly(pool):
    """After all of that; none is left behind."""
    pool.start()
    for task in range(2):
        wait_for(lambda task=task: "SIGTERM ends it." in pool.output(task))
    assert pool.end() == [0] * 2
