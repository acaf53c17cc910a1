"""Signs of life: who is in the cluster, and noticing who is lost.

TensorFlow notices at once that a worker's process has ended, but waits for ever
for one that is stopped or cut off. So a `Vigil` asks for signs of life, over
connections of its own. It cuts off from the chief who gives none, and whoever
waits for it fails at once; and soon after all others, who may wait for it
themselves.
"""

import atexit
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from fdg_keras import sockets
from fdg_keras.lookout import ANSWER_S, CUT_S, INTERVAL_S, Lookout

#: The job that workers belong to.
JOB = "worker"

# What waits for a worker that is lost fails and ends the rest of the training.
# After so many seconds it has, or waits for one that waits for the lost one.
_END_S = 4.0

#: The CPU of this process.
CHIEF = "/job:localhost/replica:0/task:0/device:CPU:0"


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
        return f"/job:{JOB}/replica:0/task:{self.index}/"

    @property
    def host(self) -> str:
        """Its first CPU."""
        return f"{self.prefix}device:CPU:0"

    def __str__(self) -> str:
        return f"task {self.index} of job '{JOB}' ({self.address})"


class Connection:
    """What this process is connected to, if anything.

    Attributes:
        tasks: The workers.
        timeout_s: Seconds within which they must give a sign of life.
        lost: Those that did not, or are known to have ended, and why.
        forsaken: Those that answer, and were cut off because others were lost.
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.timeout_s = 20.0
        self.lost: dict[Task, str] = {}
        self.forsaken: set[Task] = set()
        self._lookout: Lookout | None = None

    def begin(self, tasks: Sequence[Task], timeout_s: float) -> None:
        """Looks after these workers from now on, for as long as they answer."""
        self.tasks, self.timeout_s = list(tasks), timeout_s
        if self._lookout is not None:
            self._lookout.end()
        self._lookout = Lookout([task.end for task in tasks], timeout_s)

    def end(self) -> None:
        """Forgets them: they could not be joined, or not all.

        They are looked after still: TensorFlow may wait for some of them.
        """
        self.tasks = []


#: The one that TensorFlow allows for in a process.
connection = Connection()


@atexit.register
def _let_go() -> None:
    """Keeps the end of the process from waiting for lost workers.

    TensorFlow tells them of every function that ends, one after the other,
    with Python's lock held. One may have been lost since it was last asked.
    """
    for task in connection.tasks:
        if task not in connection.lost:
            reason = sockets.unanswered(task.end, ANSWER_S)
            if reason is not None:
                connection.lost[task] = str(reason)
    if connection.lost:
        sockets.cut_off_for_good([task.end for task in connection.lost])


class Vigil:
    """Has workers give signs of life, in threads of its own.

    Args:
        tasks: Who is asked by the chief.
        pairs: Between which CPUs, of workers or the chief, batches are sent;
            these must reach each other, too.
        timeout_s: After how many seconds without a sign they are lost.
        at_once: Whether pairs begin to send at once.

    Leaving waits for what is being sent, or until its ends are lost.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        pairs: Iterable[tuple[str, str]],
        timeout_s: float,
        at_once: bool = False,
    ):
        self._timeout_s = timeout_s
        self._interval_s = min(INTERVAL_S, timeout_s / 10)
        self._tasks = tasks
        self._answered = dict.fromkeys(tasks, time.monotonic())
        # When it was last looked at who waits, and since when some thread of
        # this process was sure to run.
        self._looked = self._awake = time.monotonic()
        # Since when some worker is lost.
        self._over: float | None = None
        # Compiled here, while it is known that all answer.
        self._sends = {pair: _sending(*pair) for pair in set(pairs)}
        self._first_pause_s = 0.0 if at_once else self._interval_s
        # For whom it is waited now, and since when.
        self._waits: tuple[tuple[str, str], float] | None = None
        self._sent = threading.Event()
        self._failure: Exception | None = None
        self._leaves, self._ended = threading.Event(), threading.Event()
        self._sender = threading.Thread(
            target=self._send, name="fdg-watch-pairs", daemon=True
        )
        self._askers = [
            threading.Thread(
                target=self._ask,
                args=[task],
                name=f"fdg-watch-{task.index}",
                daemon=True,
            )
            for task in tasks
        ]

    def __enter__(self) -> "Vigil":
        for thread in [*self._askers, self._sender]:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Workers are looked after for as long as one is waited for: else that
        # one might be lost, and waited for by a thread for ever.
        self._leaves.set()
        try:
            self._sender.join()
        finally:  # Ctrl-C may come now.
            self._ended.set()
            for thread in self._askers:
                thread.join()

    def wait_for_pairs(self) -> None:
        """Waits until each pair has sent once.

        Raises:
            tf.errors.OpError: If one cannot.
        """
        self._sent.wait()
        if self._failure is not None:
            raise self._failure

    def _ask(self, task: Task) -> None:
        """Asks a worker until it or another is lost, and then cuts it off."""
        self._answered[task] = time.monotonic()
        while not self._ended.wait(self._interval_s):
            answered = self._answered[task]
            left = answered + self._timeout_s - time.monotonic()
            patience = max(left, self._interval_s)
            reason = sockets.unanswered(
                task.end, min(ANSWER_S, self._timeout_s / 2, patience)
            )
            now = time.monotonic()
            if reason is None:
                self._answered[task] = now
            elif isinstance(reason, ConnectionRefusedError):
                connection.lost[task] = str(reason)
            elif now + self._interval_s - answered > self._timeout_s:
                silence = f"no sign of life for {now - answered:.0f} s"
                connection.lost[task] = f"{silence} ({reason})"
            self._look_at_pairs(now)
            if task in connection.lost:
                break
            if self._has_been_over(now):
                connection.forsaken.add(task)
                break
        while not self._ended.wait(CUT_S):
            sockets.cut_off([task.end])

    def _has_been_over(self, now: float) -> bool:
        """Whether some worker has been lost for long enough to end all."""
        if connection.lost and self._over is None:
            self._over = now
        return self._over is not None and now - self._over > _END_S

    def _look_at_pairs(self, now: float) -> None:
        usual = self._interval_s + min(ANSWER_S, self._timeout_s / 2)
        # Whether no thread of this process ran: then neither did who sends.
        if now - self._looked > 2 * usual:
            self._awake = now
        self._looked = now
        waits = self._waits
        if waits is None:
            return
        pair, since = waits
        if now - max(since, self._awake) <= self._timeout_s:
            return
        ends = [task for task in self._tasks if task.host in pair]
        # One that is silent to the chief, too, is named alone.
        if all(now - self._answered[task] <= usual for task in ends):
            sender, receiver = map(_name_of, pair)
            why = f"{receiver} gets nothing from {sender}"
            for task in ends:
                connection.lost.setdefault(task, why)

    def _send(self) -> None:
        """Sends a number between the CPUs of each pair, again and again.

        One after the other: TensorFlow has crashed when several threads were
        at their first calls to workers.
        """
        try:
            pause_s = self._first_pause_s
            while not self._leaves.wait(pause_s):
                pause_s = self._interval_s
                for pair, send in self._sends.items():
                    self._waits = pair, time.monotonic()
                    send()
                    self._waits = None
                self._sent.set()
        except Exception as error:
            self._failure = error
        finally:  # Whatever it was, nobody waits for ever.
            self._sent.set()


@functools.cache
def _sending(sender: str, receiver: str) -> Callable[[], Any]:
    """Compiles what sends a number from one CPU to another."""

    # Within a function a tensor goes straight from one to the other; of an
    # operation that is called eagerly the chief would pass it on.
    def send() -> tf.Tensor:
        with tf.device(sender):
            sent = tf.timestamp()
        with tf.device(receiver):
            return tf.identity(sent)

    # Traced by hand: TensorFlow's own way warns of many of them.
    return tf.function(send, autograph=False).get_concrete_function()


def _name_of(host: str) -> str:
    spec = tf.DeviceSpec.from_string(host)
    return f"task {spec.task}" if spec.job == JOB else "the chief"
