"""One epoch: who tells whom to run what, in which thread.

The threads of an epoch: the feeder, one for each stage, and the caller's.
The caller announces windows ("run so many ticks") to the feeder. The feeder
moves their batches into the links, part by part, and has the stages run each
part once it is there; it waits while more than two parts are on their way.
Each stage runs its compiled loop and reports back. Callbacks are called
between windows. At the end of an epoch all stages drain: nothing is in flight.
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

# A part is grown to last about this long: what Python does for each part then
# does not count, and the batches that wait to be run are few.
_PART_S = 0.1
_LONGEST_PART = 4096

# What a stage says when it has run the last part.
_DRAINED = object()


class Part(NamedTuple):
    """An announcement to the stages: run ticks `start <= t < stop`.

    Attributes:
        start: The first tick.
        stop: The tick after the last one.
        ends_window: Whether it is the last part of a window.
        last: Whether it is the last part of the epoch, so that stages drain.
        learning_rate: For all updates made within it.
    """

    start: int
    stop: int
    ends_window: bool
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


class Pace:
    """How many ticks there are in a window, and in each part of one.

    Args:
        window: Ticks of a window; `None` if nobody minds, so that each part
            is a window.

    Attributes:
        asked: The same.
    """

    def __init__(self, window: int | None = None):
        self.asked = window
        self._grown = 1
        self._last = 0.0

    @property
    def window(self) -> int:
        """Ticks of the next window."""
        return self.asked or self._grown

    @property
    def part(self) -> int:
        """Ticks of the next part."""
        return min(self.window, self._grown)

    def start(self) -> None:
        """Starts the clock, at the begin of an epoch."""
        self._last = time.perf_counter()

    def measure(self, ticks: int) -> None:
        """Takes note that a part of `ticks` has just ended."""
        now = time.perf_counter()
        per_tick = (now - self._last) / max(ticks, 1)
        self._last = now
        wanted = int(_PART_S / max(per_tick, 1e-9))
        self._grown = max(min(wanted, 2 * self._grown, _LONGEST_PART), 1)


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
        crew = Crew(self._pipeline.close)
        try:
            with crew:
                self._run(crew, epoch, learning_rate, begin, end)
        except BaseException:
            # All is compiled still, and only the links are closed. A thread
            # that was left behind must find them closed when it comes to.
            if crew.has_ended:
                self._pipeline.reopen()
            raise

    def _run(
        self,
        crew: Crew,
        epoch: Epoch,
        learning_rate: Callable[[], float],
        begin: Callable[[int], None],
        end: Callable[[int, dict], bool],
    ) -> None:
        """Starts the threads and announces all there is to do."""
        inboxes = [Inbox() for _ in self._pipeline.stages]
        orders, progress = Inbox(), Inbox()

        def feeder() -> None:
            self._feeder(epoch, orders, progress, inboxes)

        try:
            # A data set may block for as long as it likes.
            crew.start("fdg-feeder", feeder, may_be_left=True)
            for k, inbox in enumerate(inboxes):
                work = self._worker(crew, k, inbox, progress)
                crew.start(f"fdg-stage-{k}", work)
            self._announce(crew, orders, epoch, learning_rate, begin, end)
        except KeyboardInterrupt as error:
            error.add_note(f"Interrupted in this epoch: {self._where()}.")
            raise
        finally:
            for inbox in (orders, progress, *inboxes):
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
        announced = ended = drained = 0
        last = False

        def announce(ahead: int) -> None:
            nonlocal announced
            while not epoch.stopped and announced < ended + ahead:
                orders.put(learning_rate())
                announced += 1

        announce(self._ahead() - 1)
        while not last:
            begun = epoch.drawn
            if not epoch.stopped:
                with _noting(f"in a callback, before batch {begun}"):
                    begin(begun)
            announce(self._ahead())
            window_ended = False
            while not window_ended:
                message = crew.receive()
                if message is _DRAINED:
                    drained += 1
                    continue
                part, report = message
                epoch.drawn = part.stop
                window_ended, last = part.ends_window, part.last
            ended += 1
            if epoch.drawn > begun and not epoch.stopped:
                metrics = {k: float(v) for k, v in report.metrics.items()}
                batch = epoch.drawn - 1
                with _noting(f"in a callback, after batch {batch}"):
                    stop = end(batch, metrics)
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
        progress: Inbox,
        inboxes: Sequence[Inbox],
    ) -> None:
        """Feeds a window for each order, and announces it part by part."""
        late = delays.stage_delay(
            0, len(self._pipeline.stages), self._pipeline.delay
        )
        done = iter(progress)
        position, finished, rate = 0, 0, 0.0
        last = False
        for rate in orders:
            stop = position + self._pace.window
            if epoch.limit:
                stop = min(stop, epoch.limit)
            while position < stop and not last:
                wanted = min(self._pace.part, stop - position)
                # Stage 0 runs `late` batches ahead of the last one. Beside
                # them one part is being run, and another one waits.
                while position - finished > late + wanted:
                    try:
                        finished = next(done)
                    except StopIteration:
                        return
                where = f"in the feeder, drawing from batch {position} on"
                with _noting(where), epoch.original_failure():
                    fed = self._pipeline.feed(epoch.iterator, wanted)
                start, position = position, position + fed
                last = fed < wanted or position == epoch.limit
                ends_window = last or position == stop
                for inbox in inboxes:
                    inbox.put(Part(start, position, ends_window, last, rate))
            if last:
                return
        # No more orders: all that is left to do is to drain.
        for inbox in inboxes:
            inbox.put(Part(position, position, True, True, rate))

    def _worker(
        self, crew: Crew, k: int, inbox: Inbox, progress: Inbox
    ) -> Callable[[], None]:
        """Returns what the thread of stage k does."""
        stage, loop, usage = (
            self._pipeline.stages[k],
            self._pipeline.loops[k],
            self.usage[k],
        )
        is_final = stage is self._pipeline.stages[-1]

        def work() -> None:
            ended = time.perf_counter()
            for part in inbox:
                if crew.stopping:
                    return
                started = time.perf_counter()
                turns = delays.turns(
                    part.start, part.stop, loop.late, part.last
                )
                try:
                    report = loop(*turns, part.learning_rate)
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
                    self._pace.measure(part.stop - part.start)
                    progress.put(part.stop)
                    crew.send((part, report))
                if part.last:
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
