"""Stages on other machines: TensorFlow's cluster runtime, and its faults.

Each machine runs a worker (`python -m fdg_keras.worker`). The process that
trains, the chief, connects once; then the workers' devices are devices like any
other, and stages hand their batches from worker to worker.

TensorFlow notices at once that a worker's process has ended, but waits for ever
for one that is stopped or cut off. So a `Watch` asks the workers for signs of
life while a model is in stages, over connections of its own. It cuts off from
the chief who gives none, and whoever waits for it fails at once.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import sockets

#: The job that workers belong to.
JOB = "worker"

# A worker keeps its versions in a file without a name, which the chief reads
# where a file of that worker's process can be found by its number.
_VERSIONS_FD = 719
_VERSIONS_PATH = f"/proc/self/fd/{_VERSIONS_FD}"

# TensorFlow reads it as it connects. With streams one blocked queue operation
# would block every other call to the same worker.
_STREAMING = "TF_ENABLE_EAGER_CLIENT_STREAMING_ENQUEUE"

# Signs of life are asked for so often, or ten times within the time limit, and
# one is waited for so long.
_INTERVAL_S = 2.0
_ANSWER_S = 5.0
# Who is lost is cut off again and again: TensorFlow connects anew.
_CUT_S = 0.02


@dataclass(frozen=True)
class _Task:
    """A worker."""

    index: int
    address: str
    end: sockets.End

    @property
    def prefix(self) -> str:
        return f"/job:{JOB}/replica:0/task:{self.index}"

    @property
    def host(self) -> str:
        return f"{self.prefix}/device:CPU:0"

    def __str__(self) -> str:
        return f"task {self.index} of job '{JOB}' ({self.address})"


class _Connection:
    """What this process is connected to, if anything."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self.timeout_s = 30.0
        self.lost: dict[_Task, str] = {}


_connection = _Connection()


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
    cluster: Any = None, timeout_s: float = 30.0
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
            `fit` with a `ConnectionError`. Default 30.

    Returns:
        The names of the workers' devices, in the order of their tasks: their
        GPUs if any worker has one, else their CPUs.

    Raises:
        ValueError: If the cluster is not described well, or a worker has other
            versions of TensorFlow, Keras, `fdg_keras` or Python.
        ConnectionError: If a worker does not answer in time.
        RuntimeError: If this process is, or was, in another cluster.
    """
    if not timeout_s > 0:
        raise ValueError(
            "Expected `timeout_s` to be a positive number of seconds. "
            f"Received: {timeout_s!r}"
        )
    addresses = parse_cluster(cluster).job_tasks(JOB)
    if _check_unconnected(addresses):
        _connection.timeout_s = timeout_s
        return _devices()
    tasks = _wait_for_all(addresses, timeout_s)
    _connect(tasks, timeout_s)
    _connection.tasks = tasks
    _connection.timeout_s = timeout_s
    return _devices()


def _check_unconnected(addresses: Sequence[str]) -> bool:
    """Whether this process is in just this cluster already.

    Raises:
        RuntimeError: If it is in another one.
        ConnectionError: If it has lost a worker.
    """
    mine = [task.address for task in _connection.tasks]
    jobs = {
        tf.DeviceSpec.from_string(device.name).job
        for device in tf.config.list_logical_devices()
    }
    if mine == list(addresses):
        Watch(_devices()).check()
        return True
    if mine or jobs - {None, "localhost"}:
        raise RuntimeError(
            "TensorFlow can join one cluster in a process, and this process "
            "is in another. Expected `connect_to_cluster` to be called once, "
            "and `tf.config.experimental_connect_to_cluster` and "
            "`tf.distribute` strategies not to be used beside it. Start a new "
            f"process. Received: {list(addresses)}, in a process that is "
            f"connected to {mine or sorted(map(str, jobs))}"
        )
    return False


def _wait_for_all(addresses: Sequence[str], timeout_s: float) -> list[_Task]:
    """Waits until every worker answers; they may be starting still."""
    deadline = time.monotonic() + timeout_s
    tasks = []
    for index, address in enumerate(addresses):
        while True:
            left = deadline - time.monotonic()
            try:
                task = _Task(index, address, sockets.resolve(address)[0])
                reason = sockets.unanswered(
                    task.end, min(max(left, 0.1), _ANSWER_S)
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


def _connect(tasks: list[_Task], timeout_s: float) -> None:
    """Joins the cluster, and checks that its workers do as they should."""
    os.environ[_STREAMING] = "False"
    try:
        own = sockets.own_host(tasks[0].end, timeout_s)
        port = sockets.free_port()
        # Workers fetch from the chief what it feeds. TensorFlow itself would
        # tell them that it is at "localhost".
        spec = {JOB: [task.address for task in tasks]}
        spec["localhost"] = [
            f"[{own}]:{port}" if ":" in own else f"{own}:{port}"
        ]
        with _Vigil(tasks, timeout_s):
            tf.config.experimental_connect_to_cluster(
                tf.train.ClusterSpec(spec),
                job_name="localhost",
                protocol="grpc",
            )
            if all(sockets.is_loopback(task.address) for task in tasks):
                sockets.hold_to_loopback(port)
            for task in tasks:
                _check_versions(task)
    except (tf.errors.OpError, OSError) as error:
        text = getattr(error, "message", str(error))
        raise ConnectionError(
            "TensorFlow could not join the cluster. Expected each of "
            f"{', '.join(map(str, tasks))} to answer within {timeout_s:g} s. "
            "Restart the workers, and then this process. Received: "
            f"{text.splitlines()[0]}"
        ) from error


def _check_versions(task: _Task) -> None:
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
            f"`python -m fdg_keras.worker`. Received: {found}"
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


# -- Faults --------------------------------------------------------------------


class Watch:
    """Looks after the workers that some stages run on.

    Use it as a context manager. Within, a worker that gives no sign of life
    for as long as `connect_to_cluster` was told is cut off, and every call
    that waits for it fails with a `tf.errors.OpError`, in whatever thread.

    Args:
        devices: The device of each stage; there is nothing to do for those of
            this process.
    """

    def __init__(self, devices: Sequence[str]):
        self._devices = devices
        self._tasks = [
            task
            for task in _connection.tasks
            if any(_is_on(device, task) for device in devices)
        ]
        self._vigil = contextlib.ExitStack()

    @property
    def is_needed(self) -> bool:
        """Whether a stage is on another machine."""
        return bool(self._tasks)

    def __enter__(self) -> "Watch":
        self.check()
        self._vigil.enter_context(_Vigil(self._tasks, _connection.timeout_s))
        return self

    def __exit__(self, *_: object) -> None:
        self._vigil.close()

    def check(self) -> None:
        """Checks that no worker is known to be lost.

        Raises:
            ConnectionError: If one is.
        """
        loss = self._loss()
        if loss is not None:
            raise loss

    def find_loss(self) -> ConnectionError | None:
        """Asks all workers now; returns an error if one is lost."""
        for task in self._tasks:
            if task in _connection.lost:
                continue
            reason = sockets.unanswered(task.end, _ANSWER_S)
            if reason is not None:
                _connection.lost[task] = str(reason)
                continue
            try:
                with tf.device(task.host):
                    tf.io.read_file(_VERSIONS_PATH).numpy()
            except tf.errors.OpError:
                # Another process answers there, which knows nothing of this
                # one; or it was cut off meanwhile.
                _connection.lost.setdefault(task, "it was restarted")
        return self._loss()

    def _loss(self) -> ConnectionError | None:
        lost = [task for task in self._tasks if task in _connection.lost]
        if not lost:
            return None
        which = "; ".join(
            f"{task}, which runs {self._stages_on(task)}: "
            f"{_connection.lost[task]}"
            for task in lost
        )
        return ConnectionError(
            "A worker was lost. Expected it to answer as long as a model is "
            "in stages. See what has become of its process and the network, "
            "restart it, and then this process: a `BackupAndRestore` among "
            "the callbacks goes on from the last backup. "
            f"Received: {which}"
        )

    def _stages_on(self, task: _Task) -> str:
        stages = [
            str(k)
            for k, device in enumerate(self._devices)
            if _is_on(device, task)
        ]
        return f"stage {', '.join(stages)}"


class _Vigil:
    """Asks workers for signs of life, each in a thread of its own."""

    def __init__(self, tasks: Sequence[_Task], timeout_s: float):
        self._timeout_s = timeout_s
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._keep,
                args=(task,),
                name=f"fdg-watch-{task.index}",
                daemon=True,
            )
            for task in tasks
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _keep(self, task: _Task) -> None:
        interval = min(_INTERVAL_S, self._timeout_s / 10)
        answered = time.monotonic()
        while task not in _connection.lost and not self._ended.wait(interval):
            reason = sockets.unanswered(
                task.end, min(_ANSWER_S, self._timeout_s / 2)
            )
            now = time.monotonic()
            if reason is None:
                answered = now
            elif isinstance(reason, ConnectionRefusedError):
                _connection.lost[task] = str(reason)
            elif now - answered > self._timeout_s:
                _connection.lost[task] = (
                    f"no sign of life for {now - answered:.0f} s ({reason})"
                )
        while task in _connection.lost and not self._ended.wait(_CUT_S):
            sockets.cut_off([task.end])


def _is_on(device: str, task: _Task) -> bool:
    return device.startswith(f"{task.prefix}/")
