"""One epoch: who tells whom to run what, in which thread.

The threads of an epoch: the feeder, one for each stage, and the caller's.
The caller announces windows ("run so many ticks") to the feeder, which moves
that many batches into the links and passes the announcement on to the stages.
Each stage runs its compiled loop and reports back. At the end of an epoch all
stages drain: nothing is in flight.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fdg_keras import delays
from fdg_keras.data import Epoch
from fdg_keras.pipeline import Pipeline
from fdg_keras.threads import Crew, Inbox

# A window that nobody asked for is grown to last about this long, so that
# what Python does for each window does not count.
_WINDOW_S = 0.1
_LONGEST_WINDOW = 4096

# What a stage says when it has finished the last window.
_DRAINED = object()


class Window(NamedTuple):
    """An announcement to the stages: run ticks `start <= t < stop`."""

    start: int
    stop: int
    last: bool
    learning_rate: float


@dataclass
class Usage:
    """What a stage did with its time, in seconds, since the epoch began.

    Attributes:
        computed: Running its loop, without the waiting.
        waited_activations: For activations, or for data in stage 0.
        waited_gradients: For gradients.
        idle: For something to be announced.
        ticks: How many.
    """

    computed: float = 0.0
    waited_activations: float = 0.0
    waited_gradients: float = 0.0
    idle: float = 0.0
    ticks: int = 0


@dataclass
class Pace:
    """How many ticks a window has.

    Attributes:
        window: Ticks of the next window.
        fixed: Whether that is what the user asked for.
    """

    window: int = 1
    fixed: bool = True
    _last: float = 0.0

    def start(self) -> None:
        """Starts the clock, at the begin of an epoch."""
        self._last = time.perf_counter()

    def measure(self, ticks: int) -> None:
        """Takes note that a window of `ticks` has just ended."""
        now = time.perf_counter()
        per_tick = (now - self._last) / max(ticks, 1)
        self._last = now
        if not self.fixed:
            wanted = int(_WINDOW_S / max(per_tick, 1e-9))
            grown = min(wanted, 2 * self.window, _LONGEST_WINDOW)
            self.window = max(grown, 1)


class Conductor:
    """Runs epochs of a pipeline.

    Args:
        pipeline: What to run.
        pace: How long windows are.

    Attributes:
        usage: What each stage did with its time in the last epoch.
    """

    def __init__(self, pipeline: Pipeline, pace: Pace):
        self._pipeline = pipeline
        self._pace = pace
        self.usage: list[Usage] = []

    def run(
        self,
        epoch: Epoch,
        learning_rate: Callable[[], float] = lambda: 0.0,
        begin: Callable[[int], None] = lambda batch: None,
        end: Callable[[int, dict], bool] = lambda batch, metrics: False,
    ) -> None:
        """Runs an epoch, and drains.

        Between the announcement of a window and its end others may run: see
        `delays.windows_ahead`.

        Args:
            epoch: The batches; learns how many were drawn.
            learning_rate: Called for each announcement; in effect for all
                updates made within that window.
            begin: Called with the first batch of a window before that window
                can be the last one announced.
            end: Called with the last batch of a window, and the metrics then,
                after the last stage has run it. If it returns true nothing
                more is announced; what was announced is still run.

        Raises:
            BaseException: The first failure of anyone, as it was raised, with
                a note that says where.
        """
        for loop in self._pipeline.loops:
            loop.reset()
        self.usage = [Usage() for _ in self._pipeline.stages]
        self._pace.start()
        with Crew(self._pipeline.close) as crew:
            inboxes = [Inbox() for _ in self._pipeline.stages]
            orders = Inbox()

            def feeder() -> None:
                self._feeder(epoch, orders, inboxes)

            try:
                crew.start("fdg-feeder", feeder)
                for k, inbox in enumerate(inboxes):
                    crew.start(f"fdg-stage-{k}", self._worker(crew, k, inbox))
                self._announce(crew, orders, epoch, learning_rate, begin, end)
            except KeyboardInterrupt as error:
                error.add_note(f"Interrupted in this epoch: {self._where()}.")
                raise
            finally:
                orders.close()
                for inbox in inboxes:
                    inbox.close()

    def _announce(
        self,
        crew: Crew,
        orders: Inbox,
        epoch: Epoch,
        learning_rate: Callable[[], float],
        begin: Callable[[int], None],
        end: Callable[[int, dict], bool],
    ) -> None:
        """Announces windows and receives them, in the caller's thread."""
        announced = received = drained = 0
        last = False

        def announce(ahead: int) -> None:
            nonlocal announced
            while not epoch.stopped and announced < received + ahead:
                orders.put(learning_rate())
                announced += 1

        announce(self._ahead() - 1)
        while not last:
            position = epoch.drawn
            if not epoch.stopped:
                with _noting(f"in a callback, before batch {position}"):
                    begin(position)
            announce(self._ahead())
            while (message := crew.receive()) is _DRAINED:
                drained += 1
            window, report = message
            received += 1
            last = window.last
            epoch.drawn = position = window.stop
            self._pace.measure(window.stop - window.start)
            if window.stop > window.start and not epoch.stopped:
                metrics = {k: float(v) for k, v in report.metrics.items()}
                with _noting(f"in a callback, after batch {position - 1}"):
                    stop = end(position - 1, metrics)
                if stop:
                    epoch.stopped = True
                    orders.close()
        while drained < len(self._pipeline.stages):
            crew.receive()
            drained += 1

    def _where(self) -> str:
        """Says what each stage is doing."""
        loops = self._pipeline.loops
        return "; ".join(
            f"stage {k} at {loop.position()}" for k, loop in enumerate(loops)
        )

    def _ahead(self) -> int:
        pipeline = self._pipeline
        return delays.windows_ahead(
            len(pipeline.stages), pipeline.delay, self._pace.window
        )

    def _feeder(
        self,
        epoch: Epoch,
        orders: Inbox,
        inboxes: Sequence[Inbox],
    ) -> None:
        """Feeds and announces a window for each order."""
        position, rate = 0, 0.0
        last = False
        for rate in orders:
            limit = epoch.limit
            left = limit - position if limit else self._pace.window
            wanted = min(self._pace.window, left)
            with _noting(f"in the feeder, drawing from batch {position} on"):
                fed = self._pipeline.feed(epoch.iterator, wanted)
            last = fed < wanted or position + fed == limit
            window = Window(position, position + fed, last, rate)
            for inbox in inboxes:
                inbox.put(window)
            position += fed
            if last:
                return
        # No more orders: all that is left to do is to drain.
        for inbox in inboxes:
            inbox.put(Window(position, position, True, rate))

    def _worker(self, crew: Crew, k: int, inbox: Inbox) -> Callable[[], None]:
        """Returns what the thread of stage k does."""
        stage, loop, usage = (
            self._pipeline.stages[k],
            self._pipeline.loops[k],
            self.usage[k],
        )
        is_final = stage is self._pipeline.stages[-1]

        def work() -> None:
            ended = time.perf_counter()
            for window in inbox:
                if crew.stopping:
                    return
                started = time.perf_counter()
                turns = delays.turns(
                    window.start, window.stop, loop.late, window.last
                )
                try:
                    report = loop(*turns, window.learning_rate)
                    activations = float(report.waited_activations)
                    gradients = float(report.waited_gradients)
                except BaseException as error:
                    error.add_note(
                        f"In stage {k} ({stage.span}, on "
                        f"{stage.device}), {loop.position()} of this epoch."
                    )
                    raise
                now = time.perf_counter()
                usage.idle += started - ended
                usage.waited_activations += activations
                usage.waited_gradients += gradients
                usage.computed += now - started - activations - gradients
                usage.ticks += turns.fill + turns.steady
                ended = now
                if is_final:
                    crew.send((window, report))
                if window.last:
                    crew.send(_DRAINED)
                    return

        return work


@contextlib.contextmanager
def _noting(where: str) -> Iterator[None]:
    """Adds a note to an exception that says where it came from."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"Raised {where} of this epoch.")
        raise
