"""Looking after the workers of a model that is in stages.

What waits for a worker that is lost fails (see `vigil`), and here it becomes an
error that names the worker and its stages.
"""

import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from fdg_keras import sockets
from fdg_keras.lookout import ANSWER_S, CUT_S
from fdg_keras.placement import host_of
from fdg_keras.vigil import CHIEF, Task, Vigil, connection

# Whoever is asked has so many seconds, though others have used up the time.
_LEAST_S = 0.5


class Watch:
    """Looks after the workers that some stages run on.

    Use it as a context manager; contexts nest. Within, a worker that gives no
    sign of life for as long as `connect_to_cluster` was told is cut off, and
    every call that waits for it fails with a `tf.errors.OpError`, in whatever
    thread. One that leaves the outermost context is replaced by a
    `ConnectionError`, if a worker is lost.

    Args:
        devices: The device of each stage; there is nothing to do for those of
            this process.
    """

    def __init__(self, devices: Sequence[str]):
        self._devices = devices
        # Of all workers: TensorFlow tells each of every function.
        remote = any(
            _is_on(device, task)
            for device in devices
            for task in connection.tasks
        )
        self._tasks = connection.tasks if remote else []
        self._vigil = contextlib.ExitStack()
        self._depth = 0

    @property
    def is_needed(self) -> bool:
        """Whether a stage is on another machine."""
        return bool(self._tasks)

    def __enter__(self) -> "Watch":
        if not self._depth:
            self.check()
            # While TensorFlow tells a worker of a new function it lets no
            # other thread run, so that nobody could notice that it waits.
            deadline = time.monotonic() + connection.timeout_s
            for task in self._tasks:
                self._wait_for(task, deadline)
            self.check()
            try:
                vigil = Vigil(self._tasks, self._pairs(), connection.timeout_s)
            except tf.errors.OpError as error:
                raise self.find_loss() or error from error
            self._vigil.enter_context(vigil)
        self._depth += 1
        return self

    def __exit__(self, *details: Any) -> None:
        error = details[1] if details else None
        self._depth -= 1
        if self._depth:
            return
        with self._vigil:
            loss = self.find_loss() if may_be_of_loss(error) else None
        if loss is not None:
            raise loss from error

    def check(self) -> None:
        """Checks that no worker is known to be lost.

        Then this process compiles nothing any more, for whatever device.

        Raises:
            ConnectionError: If one is.
        """
        loss = self._loss()
        if loss is not None:
            raise loss

    def _wait_for(self, task: Task, deadline: float) -> None:
        """Waits until a worker answers, or for so long that it is lost."""
        while True:
            left = deadline - time.monotonic()
            patience = min(ANSWER_S, max(left, _LEAST_S))
            reason = sockets.unanswered(task.end, patience)
            if reason is None:
                return
            refused = isinstance(reason, ConnectionRefusedError)
            if refused or time.monotonic() + _LEAST_S > deadline:
                connection.lost[task] = str(reason)
                return
            time.sleep(CUT_S)

    def find_loss(self) -> ConnectionError | None:
        """Asks all workers now; returns an error if one is lost."""
        for task in self._tasks:
            if task in connection.lost or task in connection.forsaken:
                continue
            reason = sockets.unanswered(task.end, ANSWER_S)
            if isinstance(reason, ConnectionResetError):
                # It is about to end. Asked again, it says what it has come to.
                time.sleep(CUT_S)
                reason = sockets.unanswered(task.end, ANSWER_S) or reason
            if reason is not None:
                connection.lost[task] = str(reason)
                continue
            try:
                with tf.device(task.host):
                    tf.identity(1.0).numpy()
            except tf.errors.OpError:
                # Another process answers there, which knows nothing of this
                # one; or it was cut off meanwhile.
                connection.lost.setdefault(task, "it was restarted")
        return self._loss()

    def _loss(self) -> ConnectionError | None:
        if not connection.lost:
            return None
        which = "; ".join(
            f"{task}, which runs {self._stages_on(task)}: {why}"
            for task, why in list(connection.lost.items())
        )
        return ConnectionError(
            "A worker was lost. Expected it to answer as long as a model is "
            "in stages. See what has become of its process and the network, "
            "restart it, and then this process: a `BackupAndRestore` among "
            "the callbacks goes on from the last backup. "
            f"Received: {which}"
        )

    def _pairs(self) -> set[tuple[str, str]]:
        """Returns who send each other batches, as CPUs: sender, receiver."""
        hosts = [host_of(device) for device in self._devices]
        found = {(CHIEF, task.host) for task in self._tasks}
        for one, other in itertools.pairwise(hosts):
            found |= {(one, other), (other, one)}
        return {(a, b) for a, b in found if _process(a) != _process(b)}

    def _stages_on(self, task: Task) -> str:
        stages = [
            str(k)
            for k, device in enumerate(self._devices)
            if _is_on(device, task)
        ]
        return f"stage {', '.join(stages)}" if stages else "no stage"


def may_be_of_loss(error: BaseException | None) -> bool:
    """Whether a call to a worker that is lost fails like that."""
    # Ctrl-C just when TensorFlow makes a Python error of its own: a mixture.
    mixed = isinstance(error, RuntimeError) and "error_already_set" in str(
        error
    )
    return mixed or isinstance(error, tf.errors.OpError)


def _is_on(device: str, task: Task) -> bool:
    return device.startswith(task.prefix)


def _process(device: str) -> str:
    return device.partition("/device:")[0]
