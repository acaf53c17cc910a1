"""All stages with their links, ready to run epochs.

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
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from fdg_keras import delays
from fdg_keras.data import Epoch, Spec, make_feed
from fdg_keras.delays import Order
from fdg_keras.linearize import Stash
from fdg_keras.links import Link
from fdg_keras.objective import Objective
from fdg_keras.slicing import Graph, Slice
from fdg_keras.stages import Boundary, Ports, Stage
from fdg_keras.threads import Crew, Inbox
from fdg_keras.transforms import GradientTransformer

# A window that nobody asked for is grown to last about this long, so that
# what Python does for each window does not count.
_WINDOW_S = 0.1
_LONGEST_WINDOW = 4096

# In the links from the feeder there wait as many batches as were announced
# and not yet run, which is bounded by `delays.windows_ahead`.
_UNBOUNDED = 2**30

# What a stage says when it has finished the last window.
_DRAINED = object()


@dataclass(frozen=True)
class Settings:
    """How a pipeline trains. See `Trainer`."""

    delay: int
    order: Order
    stash: Stash
    transform: GradientTransformer


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


class Pipeline:
    """The stages of a model, compiled for one kind of batch.

    Build it with the stages' variables on their devices. After a failure its
    links are closed and it is of no more use.

    Args:
        graph: The model.
        slices: Its parts.
        devices: Where they run.
        spec: Of the batches.
        settings: How to train; `None` if not training.
        optimizers: One for each stage; empty if not training.
        objective: Loss and metrics; `None` hands out the outputs instead.
    """

    def __init__(
        self,
        graph: Graph,
        slices: Sequence[Slice],
        devices: Sequence[str],
        spec: Spec,
        settings: Settings | None,
        optimizers: Sequence[keras.optimizers.Optimizer],
        objective: Objective | None,
    ):
        self._training = settings is not None
        self._settings = settings
        self.stages = [
            Stage(k, part, device, self._training)
            for k, (part, device) in enumerate(zip(slices, devices))
        ]
        self._objective = objective
        self._input_at = {v: i for i, v in enumerate(graph.inputs)}
        self._spec = spec
        self.broken = False
        self.usage = [Usage() for _ in self.stages]
        gradients = self._trace()
        self.ports = self._connect(gradients)
        for stage, ports in zip(self.stages, self.ports):
            last = stage is self.stages[-1]
            stage.compile(
                ports,
                objective if last else None,
                optimizers[stage.index] if self._training else None,
                settings.transform if settings else (lambda g: g),
                self._late(stage.index),
                settings.order if settings else "forward_first",
            )
        self._feed = make_feed(
            [
                (ports.feeds, self._positions(stage))
                for stage, ports in zip(self.stages, self.ports)
                if ports.feeds is not None
            ],
            self.ports[-1].targets,
        )

    # -- Building -------------------------------------------------------------

    def _trace(self) -> list[list[bool]]:
        """Traces all stages; returns which sent values have a gradient."""
        boundary = Boundary()
        for stage in self.stages:
            feeds = [self._spec.inputs[i] for i in self._positions(stage)]
            boundary = stage.trace(boundary, feeds)
        has_gradient = self._gradients_of_loss(boundary)
        found = [has_gradient]
        for stage in reversed(self.stages):
            upstream = self.stages[: stage.index]
            has_gradient = stage.cut(
                has_gradient,
                self._settings.stash if self._settings else "exact",
                input_gradients=any(s.weights for s in upstream),
            )
            found.insert(0, has_gradient)
        return found[1:]

    def _gradients_of_loss(self, boundary: Boundary) -> list[bool]:
        """Returns which outputs the compiled loss depends on."""
        if not self._training:
            return [False] * len(boundary.values)
        count = len(boundary.values)
        found: list[bool] = []

        @tf.function(autograph=False)
        def probe(outputs, own_loss, targets):
            gradients = self._objective.update(
                outputs, own_loss, targets, training=True
            )
            found.extend(g is not None for g in gradients)

        probe.get_concrete_function(
            list(boundary.specs[:count]),
            boundary.specs[-1] if boundary.has_loss else None,
            list(self._objective.target_specs),
        )
        return found

    def _connect(self, gradients: list[list[bool]]) -> list[Ports]:
        """Makes the links, each on its consumer's device."""
        capacity = delays.link_capacity(
            self._settings.delay if self._settings else 1
        )
        ports = [Ports() for _ in self.stages]
        for stage in self.stages:
            mine, k = ports[stage.index], stage.index
            if stage.slice.feeds:
                specs = [self._spec.inputs[i] for i in self._positions(stage)]
                mine.feeds = Link(
                    specs, _UNBOUNDED, stage.device, f"feeds_{k}"
                )
            if stage is self.stages[-1]:
                continue
            after, theirs = self.stages[k + 1], ports[k + 1]
            sent = stage.outgoing
            mine.activations_out = theirs.activations_in = Link(
                sent.specs, capacity, after.device, f"activations_{k + 1}"
            )
            if any(gradients[k]):
                specs = [s for s, g in zip(sent.specs, gradients[k]) if g]
                mine.gradients_in = theirs.gradients_out = Link(
                    specs, capacity, stage.device, f"gradients_{k}"
                )
        final = self.stages[-1]
        if self._objective is not None:
            ports[-1].targets = Link(
                self._objective.target_specs,
                _UNBOUNDED,
                final.device,
                "targets",
            )
        else:
            ports[-1].activations_out = Link(
                final.outgoing.specs, _UNBOUNDED, final.device, "outputs"
            )
        return ports

    def _positions(self, stage: Stage) -> list[int]:
        return [self._input_at[v] for v in stage.slice.feeds]

    def _late(self, stage: int) -> int:
        if self._settings is None:
            return 0
        return delays.stage_delay(
            stage, len(self.stages), self._settings.delay
        )

    # -- Running --------------------------------------------------------------

    def run(
        self,
        epoch: Epoch,
        pace: Pace,
        learning_rate: Callable[[], float] = lambda: 0.0,
        begin: Callable[[int], None] = lambda batch: None,
        end: Callable[[int, dict], bool] = lambda batch, metrics: False,
    ) -> None:
        """Runs an epoch, and drains.

        Between the announcement of a window and its end others may run: see
        `delays.windows_ahead`.

        Args:
            epoch: The batches; learns how many were drawn.
            pace: How long windows are.
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
        for stage in self.stages:
            stage.loop.reset()
        self.usage = [Usage() for _ in self.stages]
        pace.start()
        with Crew(self._release) as crew:
            inboxes = [Inbox() for _ in self.stages]
            orders = Inbox()

            def feeder() -> None:
                self._feeder(epoch, pace, orders, inboxes)

            crew.start("fdg-feeder", feeder)
            for stage, inbox in zip(self.stages, inboxes):
                crew.start(
                    f"fdg-stage-{stage.index}", self._worker(crew, stage, inbox)
                )
            try:
                self._announce(
                    crew, orders, epoch, pace, learning_rate, begin, end
                )
            finally:
                orders.close()
                for inbox in inboxes:
                    inbox.close()

    def _announce(
        self,
        crew: Crew,
        orders: Inbox,
        epoch: Epoch,
        pace: Pace,
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

        announce(self._ahead(pace) - 1)
        while not last:
            position = epoch.drawn
            if received < announced or not epoch.stopped:
                with _noting(f"in a callback, before batch {position}"):
                    begin(position)
            announce(self._ahead(pace))
            while (message := crew.receive()) is _DRAINED:
                drained += 1
            window, report = message
            received += 1
            last = window.last
            epoch.drawn = position = window.stop
            pace.measure(window.stop - window.start)
            if window.stop > window.start:
                metrics = {k: float(v) for k, v in report.metrics.items()}
                with _noting(f"in a callback, after batch {position - 1}"):
                    stop = end(position - 1, metrics)
                if stop and not epoch.stopped:
                    epoch.stopped = True
                    orders.close()
        while drained < len(self.stages):
            crew.receive()
            drained += 1

    def _ahead(self, pace: Pace) -> int:
        delay = self._settings.delay if self._settings else 1
        return delays.windows_ahead(len(self.stages), delay, pace.window)

    def _feeder(
        self,
        epoch: Epoch,
        pace: Pace,
        orders: Inbox,
        inboxes: Sequence[Inbox],
    ) -> None:
        """Feeds and announces a window for each order."""
        position, rate = 0, 0.0
        last = False
        for rate in orders:
            limit = epoch.limit
            left = limit - position if limit else pace.window
            wanted = min(pace.window, left)
            with _noting(f"in the feeder, drawing from batch {position} on"):
                fed = self._feed(epoch.iterator, wanted)
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

    def _worker(
        self, crew: Crew, stage: Stage, inbox: Inbox
    ) -> Callable[[], None]:
        """Returns what a stage's thread does."""
        loop, usage = stage.loop, self.usage[stage.index]
        is_final = stage is self.stages[-1]

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
                        f"In stage {stage.index} ({stage.span}, on "
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

    def output(self) -> list[tf.Tensor]:
        """Returns the outputs of the next batch, for `predict`.

        They are there once `end` was called for that batch.
        """
        return self.ports[-1].activations_out.dequeue()

    def _release(self) -> None:
        """Wakes everything that waits for a link."""
        for stage in self.stages:
            for link in stage.loop.links:
                link.close()
        self.broken = True


@contextlib.contextmanager
def _noting(where: str) -> Iterator[None]:
    """Adds a note to an exception that says where it came from."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"Raised {where} of this epoch.")
        raise
