"""Stages one after the other, in one thread: what K devices would compute.

With `stash="exact"` the forward and the backward of a batch use the same
weights, so both can be run at once; what is late is only the update. An
emulation runs each batch through all stages, forward and backward, and lets
stage k apply its gradient d_k batches later: the same training as that of a
`Pipeline`, on one device, at the cost of back-propagation. Uncompiled, it is
the way to debug: everything runs eagerly, in the caller's thread.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import _keras, delays, transforms
from fdg_keras.boundaries import Boundary
from fdg_keras.checks import check_gradients
from fdg_keras.data import Epoch, Spec
from fdg_keras.feeding import Pace
from fdg_keras.objective import Objective
from fdg_keras.pipeline import Settings
from fdg_keras.slicing import Graph, Slice
from fdg_keras.stages import Stage
from fdg_keras.statistics import StageStatistics
from fdg_keras.taped import Pass
from fdg_keras.threads import noting
from fdg_keras.updates import Update


class Emulation:
    """The stages of a model, run one after the other.

    Args:
        graph: The model.
        slices: Its parts.
        devices: Where they run.
        settings: How to train; `None` if not training.
        optimizers: One for each stage; empty if not training.
        objective: Loss and metrics; `None` hands out the outputs instead.
        spec: Of the batches.
        run_eagerly: Whether nothing is compiled.
        jit_compile: Whether XLA compiles what is.
    """

    #: There is nothing to be closed, see `Pipeline`.
    closed = False

    def __init__(
        self,
        graph: Graph,
        slices: Sequence[Slice],
        devices: Sequence[str],
        settings: Settings | None,
        optimizers: Sequence[keras.optimizers.Optimizer],
        objective: Objective | None,
        spec: Spec,
        run_eagerly: bool,
        jit_compile: bool,
    ):
        training = settings is not None
        self._graph = graph
        self._settings = settings
        self._stages = [
            Stage(k, part, device, training, jit_compile, scored=True)
            for k, (part, device) in enumerate(zip(slices, devices))
        ]
        self._objective = objective
        input_at = {v: i for i, v in enumerate(graph.inputs)}
        self._feeds = [[input_at[v] for v in part.feeds] for part in slices]
        self._outputs: collections.deque = collections.deque()
        compiled = functools.partial(
            tf.function, autograph=False, jit_compile=jit_compile or None
        )
        splits = len(slices)
        #: What has not been applied yet: gradients, and the weights then.
        self._late: list[collections.deque] = [
            collections.deque() for _ in slices
        ]
        self._updates, self._delays = [], []
        for k, stage in enumerate(self._stages):
            late = staleness = 0
            if settings is not None:
                late = delays.stage_delay(k, splits, settings.delay)
                staleness = delays.staleness(
                    k, splits, settings.delay, settings.order
                )
            self._delays.append(late)
            self._updates.append(
                Update(
                    stage.weights,
                    optimizers[k] if optimizers else None,
                    staleness,
                    settings.corrections if settings else (),
                    _as_it_is if run_eagerly else compiled,
                )
            )
        self._run_batch = self._batch
        if not run_eagerly:
            self._run_batch = self._trace(spec, compiled)

    def _trace(
        self, spec: Spec, compiled: Callable[..., Any]
    ) -> Callable[..., list]:
        """Returns `_batch`, compiled once for batches of whatever size.

        So what cannot be trained is refused before training starts.
        """
        targets = tuple(self._objective.target_specs) if self._objective else ()
        batch = tf.TensorSpec((), tf.int64)
        function = compiled(
            self._batch, input_signature=(spec.inputs, targets, batch)
        )
        graph = function.get_concrete_function().graph
        if self._settings is not None:
            handed = {
                id(_keras.get_storage(v))
                for stage in self._stages
                for v in [*stage.weights, *stage.state]
            }
            read = [v for v in graph.variables if id(v) not in handed]
            self._check_reads("A layer, the loss or a metric", read)
        return function

    def _check_reads(self, where: str, read: Sequence[tf.Variable]) -> None:
        assert self._objective is not None
        self._objective.check_reads(where, read)

    # -- Running --------------------------------------------------------------

    def run(
        self,
        pace: Pace,
        epoch: Epoch,
        learning_rate: Callable[[], float],
        begin: Callable[[int], None],
        end: Callable[[int, dict], bool],
        until_pause: Callable[[], int | None],
    ) -> list[StageStatistics]:
        """Runs an epoch, and drains: see `Conductor.run`.

        Returns:
            Nothing: no stage has a time of its own.
        """
        for limit in epoch.stretches(until_pause):
            self._stream(pace, epoch, limit, learning_rate, begin, end)
        return []

    def _stream(
        self,
        pace: Pace,
        epoch: Epoch,
        limit: int | None,
        learning_rate: Callable[[], float],
        begin: Callable[[int], None],
        end: Callable[[int, dict], bool],
    ) -> None:
        """Runs from one pause to the next, in windows as a pipeline does."""
        splits = len(self._stages)
        delay = self._settings.delay if self._settings else 1
        window = pace.window
        ahead = delays.windows_ahead(splits, delay, window)
        # A window that was announced keeps the rate of that moment.
        rates: collections.deque[float] = collections.deque()
        position, last = 0, False
        try:
            while not last and (rates or not epoch.stopped):
                batch = epoch.drawn
                if not epoch.stopped:
                    with noting(f"in a callback, before batch {batch}"):
                        begin(batch)
                    while len(rates) < ahead:
                        rates.append(learning_rate())
                rate = rates.popleft()
                for update in self._updates:
                    update.set_learning_rate(tf.constant(rate, tf.float64))
                stop = min(position + window, limit or position + window)
                while position < stop and not last:
                    last = not self._draw(epoch, position)
                    position += not last
                last = last or position == limit
                epoch.drawn = epoch.drawn_before + position
                ends = last or (epoch.stopped and not rates)
                if ends:
                    self._drain(position)
                if epoch.drawn > batch and not epoch.stopped:
                    batch = epoch.drawn - 1
                    with noting(f"in a callback, after batch {batch}"):
                        epoch.stopped = end(batch, self._results())
            if not last:
                self._drain(position)
        finally:
            for late in self._late:
                late.clear()

    def _draw(self, epoch: Epoch, position: int) -> bool:
        """Runs the next batch; returns whether there was one."""
        batch = epoch.drawn_before + position
        where = f"drawing batch {batch}, or a later one ahead of time"
        with noting(where), epoch.original_failure():
            element = next(epoch.iterator, None)
        if element is None:
            return False
        element = (*element, tf.constant(position, tf.int64))
        first = self._settings and self._settings.order == "update_first"
        for k, late in enumerate(self._delays):
            if first and late:
                self._update(k, position - late)
        with noting(f"running batch {batch}"):
            found = self._run_batch(*element)
        if self._objective is None:
            self._outputs.append(found)
            return True
        for k, late in enumerate(self._delays):
            if found:
                self._late[k].append(found[k])
            if not (first and late):
                self._update(k, position - late)
        return True

    def _drain(self, position: int) -> None:
        for k, late in enumerate(self._delays):
            for batch in range(max(position - late, 0), position):
                self._update(k, batch)

    def _update(self, k: int, batch: int) -> None:
        """Applies the gradient of a batch in stage k, if there is one."""
        if batch >= 0 and self._late[k]:
            gradients, then = self._late[k].popleft()
            if any(g is not None for g in gradients):
                with noting(f"in the update of stage {k}"):
                    self._updates[k](gradients, then)

    def _results(self) -> dict:
        return {} if self._objective is None else self._objective.results()

    def output(self) -> list[tf.Tensor]:
        """Returns the outputs of the next batch, for `predict`."""
        return self._outputs.popleft()

    def forget_outputs(self) -> None:
        """Drops what nobody has taken, because predicting was stopped."""
        self._outputs.clear()

    # -- One batch ------------------------------------------------------------

    def _batch(
        self, inputs: Sequence[tf.Tensor], targets: Sequence, batch: tf.Tensor
    ) -> list:
        """Runs a batch through all stages.

        Returns:
            For each stage its gradients by the weights (`None` where there is
            none) and what is kept of the weights; the outputs of the model if
            there is no objective; nothing if not training.
        """
        passes: list[Pass] = []
        received: list[tf.Tensor] = []
        own: list[tf.Tensor] = []
        incoming = Boundary()
        for stage, update, at in zip(self._stages, self._updates, self._feeds):
            stage.incoming = incoming
            feeds = [inputs[i] for i in at]
            with _within(f"in the forward of stage {stage.index}"):
                one = Pass(stage, update, batch, feeds, received)
            passes.append(one)
            if self._settings is not None:
                stage.check_gradients_of(one.lost)
                self._check_reads(f"Stage {stage.index}", one.watched)
            own += one.own_losses
            received = one.outputs
            incoming = one.outgoing
        if self._objective is None:
            return received
        final = self._stages[-1]
        gradients = self._objective.update(
            incoming,
            received,
            tf.add_n(own) if own else None,
            targets,
            final.training,
        )
        if self._settings is None:
            return []
        found: list = []
        for one in reversed(passes):
            with _within(f"in the backward of stage {one.stage.index}"):
                by_weights, gradients = one.backward(gradients)
            found.insert(0, (by_weights, one.then))
            gradients = self._hop(gradients)
        check_gradients(
            self._stages,
            [[g is not None for g in by_weights] for by_weights, _ in found],
        )
        return found

    def _hop(self, gradients: list) -> list:
        """Returns gradients as they are after a link."""
        assert self._settings is not None
        present = [g for g in gradients if g is not None]
        if present:
            present = transforms.apply(self._settings.transform, present)
        rest = iter(present)
        return [None if g is None else next(rest) for g in gradients]


@contextlib.contextmanager
def _within(where: str) -> Iterator[None]:
    """Says where something fails: in a note, or by names of operations."""
    with noting(where), tf.name_scope(where.replace(" ", "_")):
        yield


def _as_it_is(function: Callable) -> Callable:
    return function
