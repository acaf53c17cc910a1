"""One epoch: who tells whom to run what, in which thread.

The threads of an epoch: the feeder, one for each stage, and the caller's.
The caller announces windows ("run so many ticks") to the feeder, which passes
them on to the stages as their batches are there. Each stage runs its compiled
loop and reports back. Callbacks are called between windows. At the end of an
epoch, and where a callback wants to save, all stages drain: nothing is in
flight.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from fdg_keras import delays
from fdg_keras.data import Epoch
from fdg_keras.feeding import Feeder, Pace
from fdg_keras.pipeline import Pipeline
from fdg_keras.placement import is_here
from fdg_keras.statistics import StageStatistics, Usage, collect
from fdg_keras.threads import Crew, Inbox, NothingCame, noting, warn

# What a stage says when it has run the last part, and, but for the last stage,
# when it has run a window that all are waited for.
_DRAINED, _RUN = object(), object()

# Once training was stopped, a data set that blocks is waited for so long, and
# looked at so often.
_BLOCKS_S = 2.5
_GLANCE_S = 0.25


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
        until_pause: Callable[[], int | None] = lambda: None,
    ) -> list[StageStatistics]:
        """Runs an epoch, and drains.

        Between the announcement of a window and its end others may run: see
        `delays.windows_ahead`.

        Args:
            epoch: The batches; learns how many were drawn.
            learning_rate: Called for each announcement; in effect for all
                updates made within that window.
            begin: Called with the first batch of a window before that window
                can be the last one announced; when nothing is in motion,
                before any is.
            end: Called with the last batch of a window, and the metrics then,
                after the last stage has run it; without delay, and after the
                last window before a pause or the end of the epoch, when all
                have, and nothing is in motion. If it
                returns true nothing more is announced; what was announced is
                still run.
            until_pause: Called at the begin and after each pause; says how
                many batches from there on all stages drain for the next one.

        Returns:
            What the stages did meanwhile.

        Raises:
            BaseException: The first failure of anyone, as it was raised, with
                a note that says where.
        """
        self.usage = [Usage() for _ in self._pipeline.stages]
        stages = self._pipeline.stages
        self._pace.start(any(not is_here(stage.device) for stage in stages))
        for loop in self._pipeline.loops:
            loop.probe.reset()
        for limit in epoch.stretches(until_pause):
            self._run(epoch, limit, learning_rate, begin, end)
        return collect(self._pipeline, self.usage)

    def _run(
        self,
        epoch: Epoch,
        limit: int | None,
        learning_rate: Callable[[], float],
        begin: Callable[[int], None],
        end: Callable[[int, dict], bool],
    ) -> None:
        """Runs from one pause to the next, in threads of its own."""
        for loop in self._pipeline.loops:
            loop.reset(epoch.drawn_before)
        inboxes = [Inbox() for _ in self._pipeline.stages]
        feeder = Feeder(self._pipeline, self._pace, epoch, limit, inboxes)

        def release() -> None:
            feeder.close()
            for inbox in inboxes:
                inbox.close()
            self._pipeline.close()

        crew = Crew(release)
        try:
            with crew, self._noting_interrupts():
                # A data set may block for as long as it likes.
                crew.start("fdg-feeder", feeder.run, may_be_left=True)
                for k, inbox in enumerate(inboxes):
                    work = self._worker(crew, k, inbox, feeder)
                    crew.start(f"fdg-stage-{k}", work)
                self._announce(crew, feeder, epoch, learning_rate, begin, end)
        finally:
            # All is compiled still, and only the links are closed. A thread
            # that was left behind must find them closed when it comes to.
            if self._pipeline.closed and crew.has_ended:
                self._pipeline.reopen()

    def _announce(
        self,
        crew: Crew,
        feeder: Feeder,
        epoch: Epoch,
        learning_rate: Callable[[], float],
        begin: Callable[[int], None],
        end: Callable[[int, dict], bool],
    ) -> None:
        """Announces windows and receives them, in the caller's thread."""
        stages = len(self._pipeline.stages)
        others = 0 if self._pipeline.delay else stages - 1
        announced = ended = drained = 0
        last = False

        def announce(ahead: int) -> None:
            nonlocal announced
            while not epoch.stopped and announced < ended + ahead:
                feeder.order(learning_rate())
                announced += 1

        while not last:
            begun = epoch.drawn
            if not epoch.stopped:
                with noting(
                    f"in a callback, before batch {begun} of the epoch"
                ):
                    begin(begun)
            announce(self._ahead())
            window_ended, run = False, 0
            while (
                not window_ended or run < others or (last and drained < stages)
            ):
                message = self._receive(crew, feeder, epoch)
                if message is _DRAINED:
                    drained += 1
                    continue
                if message is _RUN:
                    run += 1
                    continue
                part, report = message
                epoch.drawn = epoch.drawn_before + part.stop
                window_ended, last = part.ends_window, part.last
            ended += 1
            if epoch.drawn > begun and not epoch.stopped:
                batch = epoch.drawn - 1
                with noting(f"in a callback, after batch {batch} of the epoch"):
                    stop = end(batch, report.metrics)
                if stop:
                    epoch.stopped = True
                    feeder.finish()

    def _receive(self, crew: Crew, feeder: Feeder, epoch: Epoch) -> Any:
        """Returns the next message of a stage."""
        while True:
            try:
                return crew.receive(_GLANCE_S if epoch.stopped else None)
            except NothingCame:
                if feeder.draws_since() > _BLOCKS_S:
                    # Nobody wants these batches: end with those that came.
                    if feeder.give_up():
                        warn(
                            "Training was stopped, and the data set takes "
                            f"more than {_BLOCKS_S} seconds to draw a batch: "
                            "it is not waited for, and batches that were "
                            "announced before are not trained."
                        )
                    crew.leave()

    @contextlib.contextmanager
    def _noting_interrupts(self) -> Iterator[None]:
        """Adds a note to Ctrl-C that says what each stage was doing."""
        try:
            yield
        except KeyboardInterrupt as error:
            where = "; ".join(
                f"stage {k} at {loop.position()}"
                for k, loop in enumerate(self._pipeline.loops)
            )
            error.add_note(f"Interrupted in this epoch: {where}.")
            raise

    def _ahead(self) -> int:
        pipeline = self._pipeline
        return delays.windows_ahead(
            len(pipeline.stages), pipeline.delay, self._pace.window
        )

    def _worker(
        self, crew: Crew, k: int, inbox: Inbox, feeder: Feeder
    ) -> Callable[[], None]:
        """Returns what the thread of stage k does."""
        stage, loop, usage = (
            self._pipeline.stages[k],
            self._pipeline.loops[k],
            self.usage[k],
        )
        is_final = stage is self._pipeline.stages[-1]
        is_locked = not self._pipeline.delay

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
                    # A device that is gone does not know where it was.
                    with contextlib.suppress(Exception):
                        error.add_note(
                            f"In stage {k} ({stage.span}, on {stage.device}), "
                            f"{loop.position()} of this epoch."
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
                    feeder.advance(part.stop)
                    crew.send((part, report))
                elif is_locked and part.ends_window:
                    crew.send(_RUN)
                if part.last:
                    crew.send(_DRAINED)
                    return

        return work
