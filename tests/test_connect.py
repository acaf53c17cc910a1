"""What `connect_to_cluster` refuses, before TensorFlow joins a cluster."""

import json
import socket

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
    with pytest.raises(RuntimeError, match=r"is in another.*'ps'"):
        connect(["127.0.0.1:1"])
