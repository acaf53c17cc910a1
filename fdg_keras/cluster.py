"""Stages on other machines, by TensorFlow's own cluster runtime.

Each machine runs a worker (`python -m fdg_keras.worker`). The process that
trains, the chief, connects once; then the workers' devices are devices like any
other, and stages hand their batches from worker to worker.
"""

import contextlib
import gc
import json
import numbers
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import sockets
from fdg_keras.lookout import ANSWER_S
from fdg_keras.threads import warn
from fdg_keras.vigil import CHIEF, JOB, Task, Vigil, connection
from fdg_keras.watch import Watch

# A worker keeps its versions in a file without a name, which the chief reads
# where a file of that worker's process can be found by its number.
_VERSIONS_FD = 719
_VERSIONS_PATH = f"/proc/self/fd/{_VERSIONS_FD}"

# TensorFlow reads it as it connects. With streams one blocked queue operation
# would block every other call to the same worker.
_STREAMING = "TF_ENABLE_EAGER_CLIENT_STREAMING_ENQUEUE"

# It reads this for each call. Without, a call waits until a worker can be
# reached that was cut off, and for one that is frozen so for ever.
_FAIL_FAST = "GRPC_FAIL_FAST"

# -- Who is in the cluster -----------------------------------------------------


def tf_config() -> dict[str, Any]:
    """Returns what the environment variable `TF_CONFIG` says.

    Raises:
        ValueError: If it is not there, or not a JSON object.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            "Expected the environment variable TF_CONFIG to be a JSON object, "
            "for example "
            '\'{"cluster": {"worker": ["10.0.0.2:2222", "10.0.0.3:2222"]}}\'. '
            f"Received: {text!r}"
        )
    return found


def parse_cluster(cluster: Any) -> tf.train.ClusterSpec:
    """Returns the workers of a cluster; other jobs are left out.

    Args:
        cluster: As `connect_to_cluster` takes it, or a list of addresses.

    Raises:
        ValueError: If it is nothing of the kind, or has no workers.
    """
    if cluster is None:
        cluster = tf_config().get("cluster")
    if isinstance(cluster, tf.train.ClusterSpec):
        cluster = cluster.as_dict()
    if isinstance(cluster, (list, tuple)):
        cluster = {JOB: list(cluster)}
    workers = cluster.get(JOB) if isinstance(cluster, Mapping) else None
    if not isinstance(workers, (list, tuple)) or not workers:
        raise ValueError(
            f"Expected a cluster with a job {JOB!r}, a list of addresses: "
            "{'worker': ['10.0.0.2:2222', '10.0.0.3:2222']}, in TF_CONFIG "
            'under "cluster". '
            f"Received: {cluster!r}"
        )
    workers = [str(address).strip() for address in workers]
    for address in workers:
        sockets.split_address(address)
    if len(set(workers)) < len(workers):
        raise ValueError(
            "Expected another address for each worker, so that two on one "
            f"machine have two ports. Received: {workers!r}"
        )
    return tf.train.ClusterSpec({JOB: workers})


def versions() -> dict[str, str]:
    """Returns the versions that a chief and its workers must share."""
    try:
        own = metadata.version("fdg_keras")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "fdg_keras": own,
    }


def publish_versions() -> None:
    """Keeps the versions of this worker where a chief can read them."""
    file = os.memfd_create("fdg_keras_versions")
    os.write(file, json.dumps(versions()).encode())
    os.dup2(file, _VERSIONS_FD)
    os.close(file)


# -- Connecting ----------------------------------------------------------------


def connect_to_cluster(
    cluster: Any = None, timeout_s: float = 20.0
) -> list[str]:
    """Connects this process, the chief, to the workers of a cluster.

    Start `python -m fdg_keras.worker` on every machine first, and connect
    before models are made. Then pass what it returns on, or part of it:

        devices = fdg_keras.connect_to_cluster()
        fdg_keras.fit(model, x, y, splits=len(devices), devices=devices)

    TensorFlow's gRPC has no authentication: workers, and while it is connected
    the chief, belong on a private network. A chief all of whose workers are on
    its own machine can be reached from there only.

    Args:
        cluster: `{"worker": ["host:port", ...]}`, or a
            `tf.train.ClusterSpec`, or `None` (default) for what the
            environment variable `TF_CONFIG` says. Jobs other than `"worker"`
            are left out.
        timeout_s: Seconds within which every worker must give a sign of life,
            now and whenever a model is in stages: one that does not ends
            `fit` with a `ConnectionError`. Default 20. Another call with the
            same cluster sets it anew.

    Returns:
        The names of the workers' devices, in the order of their tasks: their
        GPUs if any worker has one, else their CPUs.

    Raises:
        ValueError: If the cluster is not described well, or a worker has other
            versions of TensorFlow, Keras, `fdg_keras` or Python.
        ConnectionError: If a worker does not answer in time.
        RuntimeError: If this process is, or was, in another cluster.
    """
    real = isinstance(timeout_s, numbers.Real)
    if not real or isinstance(timeout_s, bool) or not timeout_s > 0:
        raise ValueError(
            "Expected `timeout_s` to be a positive number of seconds. "
            f"Received: {timeout_s!r}"
        )
    addresses = parse_cluster(cluster).job_tasks(JOB)
    is_connected = _check_unconnected(addresses)
    tasks = _wait_for_all(addresses, timeout_s)
    # Before TensorFlow joins: then, too, no other thread runs in this process.
    connection.begin(tasks, timeout_s)
    if not is_connected:
        try:
            _connect(tasks, timeout_s)
        except BaseException:
            connection.end()
            raise
    return _devices()


def _check_unconnected(addresses: Sequence[str]) -> bool:
    """Whether this process is in just this cluster already.

    Raises:
        RuntimeError: If it is in another one.
        ConnectionError: If it has lost a worker.
    """
    mine = [task.address for task in connection.tasks]
    jobs = {
        tf.DeviceSpec.from_string(device.name).job
        for device in tf.config.list_logical_devices()
    } - {None, "localhost"}
    if mine == list(addresses):
        Watch(_devices()).check()
        return True
    gc.collect()
    made = sum(issubclass(type(o), tf.Variable) for o in gc.get_objects())
    if made and not mine:
        raise RuntimeError(
            "TensorFlow forgets variables that were made before it joins a "
            "cluster: what is assigned to them has no effect. Expected "
            "`connect_to_cluster` to be called before models, optimizers and "
            f"metrics are made. Received: {made} variables that are there"
        )
    if mine or jobs:
        raise RuntimeError(
            "TensorFlow can join one cluster in a process, once, and this "
            "process has joined one. Expected `connect_to_cluster` to be "
            "called once, and `tf.config.experimental_connect_to_cluster` and "
            "`tf.distribute` strategies not to be used beside it. Start a new "
            f"process. Received: {list(addresses)}, in a process that is "
            f"connected to {mine or sorted(jobs)}"
        )
    return False


def _wait_for_all(addresses: Sequence[str], timeout_s: float) -> list[Task]:
    """Waits until every worker answers; they may be starting still."""
    deadline = time.monotonic() + timeout_s
    tasks = []
    for index, address in enumerate(addresses):
        while True:
            left = deadline - time.monotonic()
            try:
                task = Task(index, address, sockets.resolve(address)[0])
                reason = sockets.unanswered(
                    task.end, min(max(left, 0.1), ANSWER_S)
                )
            except OSError as error:
                reason = error
            if reason is None:
                tasks.append(task)
                break
            if left <= 0:
                raise ConnectionError(
                    f"Task {index} of job '{JOB}' does not answer. Expected "
                    f"`python -m fdg_keras.worker` to run there, for --task "
                    f"{index}, and to answer within {timeout_s:g} s. Check "
                    "that it runs, that address and port are those it was "
                    "started with, and that no firewall is between. "
                    f"Received: {address!r}, {reason}"
                )
            time.sleep(min(0.2, left))
    return tasks


def _connect(tasks: list[Task], timeout_s: float) -> None:
    """Joins the cluster, and checks that its workers do as they should."""
    os.environ[_STREAMING] = "False"
    own = "this machine"
    try:
        host = sockets.own_host(tasks[0].end, timeout_s)
        port = sockets.free_port()
        own = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # Workers fetch from the chief what it feeds. TensorFlow itself would
        # tell them that it is at "localhost".
        spec = {JOB: [task.address for task in tasks], "localhost": [own]}
        with Vigil(tasks, [], timeout_s):
            with _failing_fast():
                tf.config.experimental_connect_to_cluster(
                    tf.train.ClusterSpec(spec), "localhost", protocol="grpc"
                )
            if all(sockets.is_loopback(task.address) for task in tasks):
                _hold_to_loopback(port)
            for task in tasks:
                _check_versions(task)
        pairs = [(CHIEF, task.host) for task in tasks]
        with Vigil(tasks, pairs, timeout_s, at_once=True) as vigil:
            vigil.wait_for_pairs()
    except (tf.errors.OpError, OSError) as error:
        for task in tasks:
            why = sockets.unanswered(task.end, 1.0)
            if why is not None:
                connection.lost.setdefault(task, str(why))
        reasons = [f"{task}: {why}" for task, why in connection.lost.items()]
        text = getattr(error, "message", str(error)).splitlines()[0]
        raise ConnectionError(
            "TensorFlow could not join the cluster. Expected every worker to "
            f"answer within {timeout_s:g} s, and to be able to connect to the "
            f"chief at {own}. Check that no firewall is between, restart the "
            "workers, and then this process. Received: "
            f"{'; '.join(reasons) or text}"
        ) from error


@contextlib.contextmanager
def _failing_fast() -> Iterator[None]:
    """Within, calls to a worker that is cut off fail."""
    before = os.environ.get(_FAIL_FAST)
    os.environ[_FAIL_FAST] = "true"
    try:
        yield
    finally:
        del os.environ[_FAIL_FAST]
        if before is not None:
            os.environ[_FAIL_FAST] = before


def _check_versions(task: Task) -> None:
    try:
        with tf.device(task.host):
            found = json.loads(tf.io.read_file(_VERSIONS_PATH).numpy())
    except tf.errors.NotFoundError:
        found = "no versions: another program than `fdg_keras.worker`"
    mine = versions()
    if found != mine:
        raise ValueError(
            f"The chief and {task} must have the same versions. Expected "
            f"{mine}. Install these on the worker's machine, start it by "
            "`python -m fdg_keras.worker`, and then this process again. "
            f"Received: {found}"
        )


def _hold_to_loopback(port: int) -> None:
    if not sockets.hold_to_loopback(port):
        warn(
            "This kernel does not let the chief refuse other machines while it "
            "is connected. TensorFlow listens on all interfaces: see that a "
            f"firewall closes port {port}."
        )


def _devices() -> list[str]:
    """Returns the devices of the workers, GPUs if there are any."""
    specs = [
        tf.DeviceSpec.from_string(device.name)
        for device in tf.config.list_logical_devices()
    ]
    specs = [spec for spec in specs if spec.job == JOB]
    kinds = {spec.device_type for spec in specs}
    kind = "GPU" if "GPU" in kinds else "CPU"
    specs = [spec for spec in specs if spec.device_type == kind]
    specs.sort(key=lambda spec: (spec.task, spec.device_index))
    return [spec.to_string() for spec in specs]
