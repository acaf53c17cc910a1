"""Workers that are lost: noticing it, and ending what waits for them.

TensorFlow notices at once that a worker's process has ended, but waits for ever
for one that is stopped or cut off. So a `Watch` asks the workers for signs of
life while a model is in stages, over connections of its own. It cuts off from
the chief who gives none, and whoever waits for it fails at once.
"""

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tensorflow as tf

from fdg_keras import sockets

#: The job that workers belong to.
JOB = "worker"

# Signs of life are asked for so often, or ten times within the time limit, and
# one is waited for so long.
_INTERVAL_S = 2.0
ANSWER_S = 5.0
# Who is lost is cut off again and again: TensorFlow connects anew.
_CUT_S = 0.05


@dataclass(frozen=True)
class Task:
    """A worker.

    Attributes:
        index: Its number in the job.
        address: As the cluster gives it.
        end: Where that leads.
    """

    index: int
    address: str
    end: sockets.End

    @property
    def prefix(self) -> str:
        """What the names of its devices begin with."""
        return f"/job:{JOB}/replica:0/task:{self.index}"

    @property
    def host(self) -> str:
        """Its first CPU."""
        return f"{self.prefix}/device:CPU:0"

    def __str__(self) -> str:
        return f"task {self.index} of job '{JOB}' ({self.address})"


class Connection:
    """What this process is connected to, if anything.

    Attributes:
        tasks: The workers.
        timeout_s: Seconds within which they must give a sign of life.
        lost: Those that did not, or are known to have ended, and why.
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.timeout_s = 30.0
        self.lost: dict[Task, str] = {}


#: The one that TensorFlow allows for in a process.
connection = Connection()


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
            for task in connection.tasks
            if any(_is_on(device, task) for device in devices)
        ]
        self._vigil = contextlib.ExitStack()

    @property
    def is_needed(self) -> bool:
        """Whether a stage is on another machine."""
        return bool(self._tasks)

    def __enter__(self) -> "Watch":
        self.check()
        self._vigil.enter_context(
            Vigil(self._tasks, self._pairs(), connection.timeout_s)
        )
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
            if task in connection.lost:
                continue
            reason = sockets.unanswered(task.end, ANSWER_S)
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
        lost = [task for task in self._tasks if task in connection.lost]
        if not lost:
            return None
        which = "; ".join(
            f"{task}, which runs {self._stages_on(task)}: "
            f"{connection.lost[task]}"
            for task in lost
        )
        return ConnectionError(
            "A worker was lost. Expected it to answer as long as a model is "
            "in stages. See what has become of its process and the network, "
            "restart it, and then this process: a `BackupAndRestore` among "
            "the callbacks goes on from the last backup. "
            f"Received: {which}"
        )

    def _pairs(self) -> set[tuple[Task, Task]]:
        """Returns who hand batches to each other: activations, gradients."""
        found = set()
        for devices in itertools.pairwise(self._devices):
            ends = [t for d in devices for t in self._tasks if _is_on(d, t)]
            if len({*ends}) == 2:
                found |= {(ends[0], ends[1]), (ends[1], ends[0])}
        return found

    def _stages_on(self, task: Task) -> str:
        stages = [
            str(k)
            for k, device in enumerate(self._devices)
            if _is_on(device, task)
        ]
        return f"stage {', '.join(stages)}"


class Vigil:
    """Has workers give signs of life, in threads of its own.

    Args:
        tasks: Who is asked by the chief.
        pairs: Who else hand batches to each other, and so must reach each
            other.
        timeout_s: After how many seconds without a sign they are lost.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        pairs: Iterable[tuple[Task, Task]],
        timeout_s: float,
    ):
        self._timeout_s = timeout_s
        self._interval_s = min(_INTERVAL_S, timeout_s / 10)
        self._ended = threading.Event()
        # Since when one waits for what another sends.
        self._waits: dict[tuple[Task, Task], float] = {}
        jobs = [functools.partial(self._ask, task) for task in tasks]
        jobs += [functools.partial(self._send, *pair) for pair in pairs]
        self._threads = [
            threading.Thread(target=job, name=f"fdg-watch-{i}", daemon=True)
            for i, job in enumerate(jobs)
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, task: Task) -> None:
        """Asks a worker until it is lost, and then cuts it off."""
        answered = time.monotonic()
        while not self._ended.wait(self._interval_s):
            left = answered + self._timeout_s - time.monotonic()
            patience = max(left, self._interval_s)
            reason = sockets.unanswered(
                task.end, min(ANSWER_S, self._timeout_s / 2, patience)
            )
            now = time.monotonic()
            if reason is None:
                answered = now
            elif isinstance(reason, ConnectionRefusedError):
                connection.lost[task] = str(reason)
            elif now + self._interval_s - answered > self._timeout_s:
                silence = f"no sign of life for {now - answered:.0f} s"
                connection.lost[task] = f"{silence} ({reason})"
            self._look_at_pairs(now)
            if task in connection.lost:
                break
        while not self._ended.wait(_CUT_S):
            sockets.cut_off([task.end])

    def _look_at_pairs(self, now: float) -> None:
        for pair, since in list(self._waits.items()):
            # One that is stopped has been found before, and is named alone.
            if now - since > self._timeout_s:
                for task, other in (pair, pair[::-1]):
                    connection.lost.setdefault(
                        task, f"it and task {other.index} are cut off"
                    )

    def _send(self, sender: Task, receiver: Task) -> None:
        """Sends a number from one worker to another, again and again."""

        # Within a function a tensor goes straight from one to the other; of
        # an operation that is called eagerly the chief would pass it on.
        def hand_on() -> tf.Tensor:
            with tf.device(sender.host):
                sent = tf.timestamp()
            with tf.device(receiver.host):
                return tf.identity(sent)

        with contextlib.suppress(tf.errors.OpError):
            function = tf.function(hand_on, autograph=False)
            while not self._ended.wait(self._interval_s):
                self._waits[sender, receiver] = time.monotonic()
                function()
                del self._waits[sender, receiver]


def _is_on(device: str, task: Task) -> bool:
    return device.startswith(f"{task.prefix}/")
