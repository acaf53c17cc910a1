"""Serves this machine's devices to a chief: `python -m fdg_keras.worker`.

A worker is a `tf.distribute.Server`. It computes what the process that trains,
the chief, places on its devices, see `fdg_keras.connect_to_cluster`.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence

import tensorflow as tf

from fdg_keras import cluster, sockets
from fdg_keras.vigil import JOB

# Parameters of glibc's `mallopt`, and what they are set to, in bytes: blocks up
# to 32 MiB, the most that each version takes, are kept, and 1 GiB of them.
_MMAP_THRESHOLD, _LARGEST_KEPT = -3, 32 * 2**20
_TRIM_THRESHOLD, _MOST_KEPT = -1, 2**30

_DESCRIPTION = """\
Serves the devices of this machine to fdg_keras.fit in another process, the
chief. Give the same cluster to every worker and to the chief, in TF_CONFIG or
as flags:

  python -m fdg_keras.worker --cluster 10.0.0.2:2222,10.0.0.3:2222 --task 0 \\
      --allow_network

or

  TF_CONFIG='{"cluster": {"worker": ["10.0.0.2:2222", "10.0.0.3:2222"]},
              "task": {"type": "worker", "index": 0}}'

It runs until SIGTERM or Ctrl-C, and then ends with exit code 0.

SECURITY: TensorFlow's gRPC has neither authentication nor encryption. Whoever
can connect to a worker can run code in it, and read and write its files as the
user it runs as. Workers belong on a private network that only you can reach.
Without --allow_network a worker takes loopback addresses only, and the kernel
refuses connections from other machines. TensorFlow can listen on all interfaces
only; with --allow_network it does, and a firewall must decide who may connect.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a worker until it is told to end."""
    args = _parser().parse_args(arguments)
    try:
        spec, index = _choose_task(args)
        address = spec.task_address(JOB, index)
        _check_address(address, args.allow_network)
    except (ValueError, OSError) as error:
        sys.exit(f"fdg_keras.worker: {error}")
    _, port = sockets.split_address(address)
    if not sockets.is_free(port):
        sys.exit(
            f"fdg_keras.worker: port {port} is taken. Expected nobody to "
            "listen on it. Does a worker run already? `ss -ltnp` tells who "
            f"listens; or give this task another port. Received: {address}"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _keep_freed_memory()
    # Before anybody can connect, and look for them.
    cluster.publish_versions()
    server = _serve(spec, index, port, args.allow_network)
    print(_greeting(spec, index, args.allow_network), flush=True)
    name = _wait_for_signal(signal.SIGTERM, signal.SIGINT)
    print(f"{name}: the worker at {server.target} ends.", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fdg_keras.worker",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cluster",
        help="addresses of all workers in the order of their tasks, "
        "host:port,host:port,...; default: TF_CONFIG",
    )
    parser.add_argument(
        "--task",
        type=int,
        help="which of them this one is, from 0; default: TF_CONFIG",
    )
    parser.add_argument(
        "--allow_network",
        action="store_true",
        help="let other machines connect; only where all of them are yours",
    )
    return parser


def _choose_task(args: argparse.Namespace) -> tuple[tf.train.ClusterSpec, int]:
    """Returns all workers, and which of them this one is."""
    if args.cluster is None:
        spec = cluster.parse_cluster(None)
        task = cluster.tf_config().get("task") or {}
        if not isinstance(task, dict):
            raise ValueError(
                'Expected "task" in TF_CONFIG to be as in {"type": "worker", '
                f'"index": 0}}. Received: {task!r}'
            )
        kind, index = task.get("type", JOB), task.get("index")
        if kind != JOB and args.task is None:
            raise ValueError(
                f"Expected a task of type {JOB!r} in TF_CONFIG. A "
                "chief is no worker: it is the process that calls "
                f"`fdg_keras.fit`. Received: {kind!r}"
            )
    else:
        spec = cluster.parse_cluster(args.cluster.split(","))
        index = None
    if args.task is not None:
        index = args.task
    count = spec.num_tasks(JOB)
    if not str(index).isdecimal() or int(str(index)) >= count:
        raise ValueError(
            f"Expected the task of this worker, 0 to {count - 1}, as --task "
            'or as {"task": {"type": "worker", "index": ...}} in TF_CONFIG. '
            f"Received: {index!r}"
        )
    return spec, int(str(index))


def _check_address(address: str, allow_network: bool) -> None:
    if allow_network or sockets.is_loopback(address):
        return
    raise ValueError(
        "Other machines can reach this address, and TensorFlow's gRPC has no "
        "authentication: whoever connects can run code here. Expected a "
        "loopback address such as '127.0.0.1:2222', or --allow_network, on a "
        f"private network. Received: {address!r}"
    )


def _keep_freed_memory() -> None:
    """Has the process keep the memory of messages for the next ones.

    Else glibc hands megabytes back to the system as soon as they are free, and
    takes them anew, page by page, at each tick.
    """
    with contextlib.suppress(OSError, AttributeError):  # Another C library.
        mallopt = ctypes.CDLL(None).mallopt
        # The second alone would fix the first at its default, 128 KiB.
        if mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT):
            mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def _serve(
    spec: tf.train.ClusterSpec, index: int, port: int, allow_network: bool
) -> tf.distribute.Server:
    """Starts the server, in threads of TensorFlow's."""
    config = tf.compat.v1.ConfigProto()
    # Threads without work look for some busily before they sleep. They take
    # that from the stage that computes and from gRPC, and between messages
    # from other processes there is mostly none.
    config.experimental.disable_thread_spinning = True
    try:
        server = tf.distribute.Server(spec, JOB, index, "grpc", config=config)
    except tf.errors.OpError as error:
        sys.exit(
            f"fdg_keras.worker: TensorFlow could not serve on port {port}. "
            f"Expected a port that is free. Received: {error.message}"
        )
    if not allow_network and not sockets.hold_to_loopback(port):
        print(
            "WARNING: this kernel does not let the worker refuse other "
            f"machines. TensorFlow listens on all interfaces: see that a "
            f"firewall closes port {port}.",
            file=sys.stderr,
        )
    return server


def _wait_for_signal(*signals: signal.Signals) -> str:
    """Waits for one of the signals; returns its name."""
    # A signal may come to a thread of TensorFlow's, which does not wake this
    # one; a byte in a socket does.
    received, sent = socket.socketpair()
    sent.setblocking(False)
    signal.set_wakeup_fd(sent.fileno())
    for number in signals:
        signal.signal(number, lambda *_: None)
    while True:
        name = signal.Signals(received.recv(1)[0]).name
        if name in [one.name for one in signals]:
            return name


def _greeting(
    spec: tf.train.ClusterSpec, index: int, allow_network: bool
) -> str:
    """Says what this is, and what to do next."""
    addresses = spec.job_tasks(JOB)
    config = json.dumps({"cluster": {JOB: addresses}})
    who = "from every machine that reaches it" if allow_network else "locally"
    return (
        f"fdg_keras worker, task {index} of {len(addresses)}, process "
        f"{os.getpid()}, at {addresses[index]} ({who}).\n"
        "Start the others; then, in the process that trains:\n"
        f"    export TF_CONFIG='{config}'\n"
        "    devices = fdg_keras.connect_to_cluster()\n"
        "    fdg_keras.fit(model, x, y, splits=len(devices), "
        "devices=devices)\n"
        "Ctrl-C or SIGTERM ends it."
    )


if __name__ == "__main__":
    main()
