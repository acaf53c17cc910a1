"""What `connect_to_cluster` refuses, before TensorFlow joins a cluster."""

import contextlib
import json
import socket
import threading
import time

import pytest
import tensorflow as tf

import fdg_keras
from fdg_keras import cluster, sockets, vigil, watch


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """As in a process that has made none yet."""
    monkeypatch.setattr(cluster.gc, "get_objects", lambda: [])


def connect(addresses, timeout_s=0.3):
    return fdg_keras.connect_to_cluster({"worker": addresses}, timeout_s)


def test_nobody_answers():
    first, second = (f"127.0.0.1:{sockets.free_port()}" for _ in range(2))
    with pytest.raises(
        ConnectionError,
        match=f"Task 0 of job 'worker' does not answer.* Received: '{first}'",
    ):
        connect([first, second])


def test_another_program_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            ConnectionError, match=r"does not answer.*timed out"
        ):
            connect([address])


def test_an_unknown_host():
    with pytest.raises(ConnectionError, match=r"Task 0 .*does not answer"):
        connect(["no-such-host.invalid:2222"])


@pytest.mark.parametrize(
    "given", [{}, {"worker": []}, {"ps": ["a:1"]}, 3, {"worker": "a:1"}]
)
def test_no_workers(given):
    with pytest.raises(ValueError, match="a cluster with a job 'worker'"):
        fdg_keras.connect_to_cluster(given)


def test_the_same_address_twice():
    with pytest.raises(ValueError, match="another address for each worker"):
        connect(["127.0.0.1:1", "127.0.0.1:1"])


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "20", None, True])
def test_no_time(seconds):
    with pytest.raises(ValueError, match="positive number of seconds"):
        connect(["127.0.0.1:1"], seconds)


def test_no_configuration(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(ValueError, match=r"TF_CONFIG .* Received: ''"):
        fdg_keras.connect_to_cluster()


def test_the_configuration_is_that_of_tensorflow(monkeypatch):
    """Other jobs, and who we are, do not matter."""
    config = {
        "cluster": {"chief": ["a:1"], "worker": ["b:2", "c:3"]},
        "task": {"type": "chief", "index": 0},
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    spec = cluster.parse_cluster(None)
    assert spec.as_dict() == {"worker": ["b:2", "c:3"]}
    assert cluster.parse_cluster(spec) == spec


def test_variables_that_would_be_forgotten(monkeypatch):
    variable = tf.Variable(1.0)
    monkeypatch.setattr(cluster.gc, "get_objects", lambda: [variable, 3])
    with pytest.raises(
        RuntimeError, match=r"before models, .* Received: 1 variables"
    ):
        connect(["127.0.0.1:1"])


def test_connecting_again_asks_the_workers(monkeypatch):
    """One of them may be gone since, and nobody has noticed yet."""
    monkeypatch.setattr(cluster, "_check_unconnected", lambda addresses: True)
    with pytest.raises(ConnectionError, match=r"Task 0 .* does not answer"):
        connect(["127.0.0.1:1"])


@pytest.mark.parametrize("reason", [None, TimeoutError("timed out")])
def test_the_end_does_not_wait_for_a_worker_that_is_gone(monkeypatch, reason):
    """It may have frozen since it was last asked."""
    task = vigil.Task(0, "127.0.0.1:1", sockets.resolve("127.0.0.1:1")[0])
    there = vigil.Connection()
    there.tasks = [task]
    cut = []
    monkeypatch.setattr(vigil, "connection", there)
    monkeypatch.setattr(sockets, "unanswered", lambda end, seconds: reason)
    monkeypatch.setattr(sockets, "cut_off_for_good", cut.extend)
    vigil._let_go()
    assert cut == ([task.end] if reason else [])


@pytest.mark.parametrize(
    "then", [ConnectionRefusedError("refused"), ConnectionResetError("reset")]
)
def test_a_worker_that_is_about_to_end_is_asked_again(monkeypatch, then):
    """Whoever is told of a loss hears what has become of the worker."""
    answers = [ConnectionResetError("reset"), then]
    there = vigil.Connection()
    there.tasks = [vigil.Task(0, "there:1", ("127.0.0.1", 1))]
    monkeypatch.setattr(watch, "connection", there)
    monkeypatch.setattr(sockets, "unanswered", lambda *_: answers.pop(0))
    loss = watch.Watch([there.tasks[0].host]).find_loss()
    assert str(loss).endswith(f"runs stage 0: {then}")


def test_those_who_are_silent_share_the_time(monkeypatch):
    """However many they are."""
    servers, there = [], vigil.Connection()
    with contextlib.ExitStack() as stack:
        for index in range(3):
            server = stack.enter_context(socket.create_server(("", 0)))
            servers.append(server)
            end = ("127.0.0.1", server.getsockname()[1])
            there.tasks.append(vigil.Task(index, f"{end[0]}:{end[1]}", end))
        there.timeout_s = 1.5
        monkeypatch.setattr(watch, "connection", there)
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="was lost") as caught:
            watch.Watch([there.tasks[0].host]).__enter__()
        assert 1.0 < time.monotonic() - start < 4.0
    assert len(there.lost) == 3
    assert str(caught.value).count("timed out") == 3


def test_a_chief_that_the_network_can_reach_says_so(monkeypatch):
    monkeypatch.setattr(sockets, "hold_to_loopback", lambda port: False)
    with pytest.warns(UserWarning, match="firewall closes port 2345"):
        cluster._hold_to_loopback(2345)


@pytest.fixture
def two_tasks(monkeypatch):
    """Of which all, and a pair, are looked at by hand."""
    there = vigil.Connection()
    monkeypatch.setattr(vigil, "connection", there)
    monkeypatch.setattr(vigil, "_sending", lambda *pair: None)
    tasks = [vigil.Task(i, f"10.0.0.{i}:1", ("10.0.0.9", 1)) for i in range(2)]
    pair = (tasks[0].host, tasks[1].host)
    found = vigil.Vigil(tasks, [pair], timeout_s=10.0)

    def look(now, answered, since):
        found._answered = dict(zip(tasks, answered))
        found._waits = (pair, since)
        found._looked, found._awake = now - 1, 0.0
        found._look_at_pairs(now)
        return [task.index for task in there.lost]

    return found, look


def test_who_is_cut_off_from_another_is_named_with_him(two_tasks):
    _, look = two_tasks
    assert look(100.0, [99.5, 99.5], since=91.0) == []
    assert look(100.0, [99.5, 99.5], since=89.0) == [0, 1]


def test_who_answers_is_not_named_beside_who_is_silent(two_tasks):
    _, look = two_tasks
    assert look(100.0, [99.5, 91.0], since=85.0) == []


def test_nobody_is_named_for_what_this_process_did_not_do(two_tasks):
    """While TensorFlow held Python's lock nothing was sent."""
    found, look = two_tasks
    look(100.0, [99.5, 99.5], since=95.0)
    found._look_at_pairs(130.0)
    assert not vigil.connection.lost
    found._answered = dict.fromkeys(found._answered, 131.0)
    found._look_at_pairs(131.0)
    assert not vigil.connection.lost


def test_leaving_looks_after_workers_while_one_is_waited_for(monkeypatch):
    """One that answers, but waits itself for one that is lost."""
    there, tasks = vigil.Connection(), []
    for index in range(2):
        end = ("10.0.0.9", index + 1)
        tasks.append(vigil.Task(index, f"{end[0]}:{end[1]}", end))
    waits, cut = threading.Event(), threading.Event()

    def send():
        waits.set()
        cut.wait(20)
        raise tf.errors.UnavailableError(None, None, "cut off")

    def unanswered(end, seconds):
        return ConnectionRefusedError() if end == tasks[1].end else None

    def cut_off(ends):
        if tasks[0].end in ends:
            cut.set()

    monkeypatch.setattr(vigil, "connection", there)
    monkeypatch.setattr(vigil, "_sending", lambda *pair: send)
    monkeypatch.setattr(vigil, "_END_S", 0.2)
    monkeypatch.setattr(sockets, "unanswered", unanswered)
    monkeypatch.setattr(sockets, "cut_off", cut_off)
    pair = (tasks[0].host, tasks[1].host)
    with vigil.Vigil(tasks, [pair], timeout_s=1.0, at_once=True) as found:
        waits.wait()
    assert cut.is_set()
    assert there.lost.keys() == {tasks[1]}
    assert there.forsaken == {tasks[0]}
    with pytest.raises(tf.errors.UnavailableError, match="cut off"):
        found.wait_for_pairs()


def test_a_mixture_of_errors_may_be_of_a_lost_worker():
    text = "pybind11::error_already_set: ORIGINAL x REPLACED BY y"
    assert watch.may_be_of_loss(RuntimeError(text))
    assert watch.may_be_of_loss(tf.errors.UnavailableError(None, None, ""))
    assert not watch.may_be_of_loss(RuntimeError("another"))
    assert not watch.may_be_of_loss(None)


def test_another_cluster(monkeypatch):
    monkeypatch.setattr(
        cluster.tf.config,
        "list_logical_devices",
        lambda: [
            tf.config.LogicalDevice("/job:ps/replica:0/task:0/device:CPU:0", "")
        ],
    )
    with pytest.raises(RuntimeError, match=r"has joined one\..*'ps'"):
        connect(["127.0.0.1:1"])
