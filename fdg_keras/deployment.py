"""A sliced model on its devices, with a pipeline for each way to run it."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.conductor import Conductor
from fdg_keras.data import Batches, Spec
from fdg_keras.emulation import Emulation
from fdg_keras.feeding import Pace
from fdg_keras.loans import Loan
from fdg_keras.objective import Objective
from fdg_keras.optimizers import StageOptimizers
from fdg_keras.pipeline import Pipeline, Settings
from fdg_keras.slicing import Graph, Slice
from fdg_keras.statistics import StageStatistics, Totals
from fdg_keras.validation import check_trainable

Mode = Literal["train", "test", "predict"]


@dataclass(frozen=True)
class Built:
    """A pipeline, and what it was built for."""

    spec: Spec
    compiled: tuple
    trainable: list[list[keras.Variable]]
    pipeline: Pipeline | Emulation
    optimizers: StageOptimizers | None
    probed: bool

    def serves(
        self, spec: Spec, compiled: tuple, trainable: list, probed: bool
    ) -> bool:
        """Whether it can be used for this, too."""
        mine = [*self.compiled, *itertools.chain(*self.trainable)]
        others = [*compiled, *itertools.chain(*trainable)]
        return (
            not self.pipeline.closed
            and self.spec == spec
            and self.probed >= probed
            and len(mine) == len(others)
            and all(a is b for a, b in zip(mine, others))
        )


class Deployment:
    """A sliced model on its devices.

    Pipelines are built when they are first needed, and kept. Use it as a
    context manager: within, the stages' variables are on their devices.
    Contexts nest.

    Args:
        model: A compiled model.
        graph: The same model, as a graph.
        slices: Its stages.
        devices: Where they run.
        settings: How to train.
        emulate: Whether training runs one stage after the other.

    Attributes:
        model: The model.
        watch: Looks after workers that stages are on.
        statistics: Of each stage in the last epoch of training; empty before,
            and if the stages were emulated.
        totals: Of the epochs since it was set anew.
    """

    def __init__(
        self,
        model: keras.Model,
        graph: Graph,
        slices: Sequence[Slice],
        devices: Sequence[str],
        settings: Settings,
        emulate: bool = False,
    ):
        self.model = model
        self._graph = graph
        self._slices = slices
        self._devices = devices
        self._settings = settings
        self._emulate = emulate
        self._loan = Loan(model, devices, self._forget)
        self.watch = self._loan.watch
        self._saved_steps = 0
        self._built: dict[Mode, Built] = {}
        self._left: list[Pipeline | Emulation] = []
        # As they were when training was built, until the first epoch of it.
        self._attributes: dict | None = None
        self.statistics: list[StageStatistics] = []
        self.totals = Totals()

    def __enter__(self) -> "Deployment":
        self._loan.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._loan.__exit__(*details)

    def held_bytes(self, batch_size: int) -> list[tuple[int, int]]:
        """Returns what `Pipeline.held_bytes` does of the stages that train.

        Empty if there are none, or they are emulated.
        """
        built = self._built.get("train")
        if built is None or not isinstance(built.pipeline, Pipeline):
            return []
        return built.pipeline.held_bytes(batch_size)

    def _forget(self) -> None:
        """Lets go of what was built, and counts steps as of the last save."""
        built = self._built.get("train")
        if built and built.optimizers and self._loan.saved:
            built.optimizers.steps = self._saved_steps
        self._built.clear()
        self._left.clear()
        gc.collect()

    def run(
        self,
        mode: Mode,
        batches: Batches,
        pace: Pace,
        begin: Callable[[int], None],
        end: Callable[[int, dict], bool],
        until_pause: Callable[[], int | None],
    ) -> None:
        """Runs one epoch, within the context. See `Conductor.run`."""
        if mode == "train" and self._attributes is not None:
            # What callbacks have set since, Keras would trace with.
            changes = _attributes(self.model).items() - self._attributes.items()
            if changes:
                self._rebuild(batches.spec, changes)
            self._attributes = None
        built = self.build(mode, batches.spec, goes_on=mode == "train")
        optimizers = built.optimizers
        run = _runner(built.pipeline, pace)
        with batches.epoch() as epoch:
            if optimizers is None:
                run(epoch, lambda: 0.0, begin, end, lambda: None)
                return
            optimizers.pull()
            before = optimizers.steps
            # Without delay nothing is in motion when a batch has ended, and
            # metrics that layers of earlier stages keep can be read, too.
            everywhere = not self._settings.delay and any(
                layer.metrics
                for part in self._slices[:-1]
                for layer in part.layers
            )

            def counted_end(batch: int, metrics: dict) -> bool:
                optimizers.steps = before + batch + 1
                if everywhere:
                    metrics = self.model.get_metrics_result()
                return end(batch, metrics)

            rate = optimizers.learning_rate
            self.statistics = []
            if not self._loan.saved:
                self._save(optimizers)
            try:
                self.statistics = run(
                    epoch, rate, begin, counted_end, until_pause
                )
                self.totals.add([one.usage for one in self.statistics])
            except BaseException:
                # It is not to be hidden by another one of a lost worker.
                with contextlib.suppress(tf.errors.OpError):
                    optimizers.push()
                raise
            optimizers.push()
            self._save(optimizers)

    def _save(self, optimizers: StageOptimizers) -> None:
        """Keeps what is left if a worker is lost, in case there are any."""
        self._loan.save()
        self._saved_steps = optimizers.steps

    def build(
        self,
        mode: Mode,
        spec: Spec,
        probed: bool = False,
        goes_on: bool = False,
        optimizers: StageOptimizers | None = None,
    ) -> Built:
        """Returns what runs batches like `spec`, built if need be.

        To be called within the context.

        Args:
            mode: What it is for.
            spec: Of the batches.
            probed: Whether it must have probes, see `Pipeline`.
            goes_on: Whether layers that were frozen or thawed since are left
                as they were: Keras, too, obeys when `fit` begins.
            optimizers: To train with, if it is built. Default: new ones.
        """
        model = self.model
        compiled = () if mode == "predict" else _keras.compiled_parts(model)
        compiled = (*compiled, model.run_eagerly)
        trainable = [part.trainable_variables for part in self._slices]
        built = self._built.get(mode)
        if built is not None and goes_on:
            trainable = built.trainable
        elif mode == "train":
            check_trainable(model, trainable)
        # Who asked for probes asked for all epochs, whatever changes meanwhile.
        probed = probed or (built is not None and built.probed)
        if built is not None and built.serves(
            spec, compiled, trainable, probed
        ):
            return built
        if built is not None and built.pipeline.closed:
            # A thread that was left behind still has it, and must not be the
            # one to take it apart.
            self._left.append(built.pipeline)
        pipeline, optimizers = self._assemble(
            mode, spec, trainable, probed, optimizers
        )
        if mode == "train":
            self._attributes = _attributes(model)
        self._built[mode] = Built(
            spec, compiled, trainable, pipeline, optimizers, probed
        )
        return self._built[mode]

    def _rebuild(self, spec: Spec, changes: Iterable) -> None:
        """Builds for training anew, with layers and optimizer as they are.

        Args:
            spec: Of the batches.
            changes: Of `_attributes`. Optimizers of stages are told of those
                of the model's; they keep the slots that they have.
        """
        old = self._built.pop("train")
        assert old.optimizers is not None
        for (part, name), value in changes:
            if part == id(self.model.optimizer):
                for optimizer in old.optimizers.stages:
                    setattr(optimizer, name, value)
        self.build("train", spec, old.probed, optimizers=old.optimizers)

    def _assemble(
        self,
        mode: Mode,
        spec: Spec,
        trainable: list,
        probed: bool,
        optimizers: StageOptimizers | None,
    ) -> tuple[Pipeline | Emulation, StageOptimizers | None]:
        """Makes what runs batches, with variables in place.

        Args:
            mode: What it is for.
            spec: Of the batches.
            trainable: The trainable variables of each stage.
            probed: Whether it must have probes.
            optimizers: To train with; `None` makes new ones.
        """
        model = self.model
        objective = None
        if mode != "predict":
            objective = Objective(model, self._graph, self._slices, spec)
        self._relocate()
        if mode == "train" and optimizers is None:
            optimizers = StageOptimizers(
                model.optimizer,
                model.trainable_variables,
                trainable,
                self._devices,
                self._loan.relocation,
            )
        parts = (
            self._graph,
            self._slices,
            self._devices,
            self._settings if mode == "train" else None,
            optimizers.stages if optimizers else [],
            objective,
        )
        eagerly, jit_compile = model.run_eagerly, self._loan.jit_compile
        if eagerly or (self._emulate and mode == "train"):
            return Emulation(*parts, spec, eagerly, jit_compile), optimizers
        return Pipeline(*parts, spec, jit_compile, probed), optimizers

    def _relocate(self) -> None:
        """Moves the variables of layers and metrics to their stages."""
        for part, device in zip(self._slices, self._devices):
            for variable in part.trainable_variables + part.state_variables:
                self._loan.relocation.move(variable, device)
        for metric in self.model.metrics:
            for variable in metric.variables:
                self._loan.relocation.move(variable, self._devices[-1])


def _runner(pipeline: Pipeline | Emulation, pace: Pace) -> Callable:
    """Returns what runs an epoch, as `Conductor.run` does."""
    if isinstance(pipeline, Emulation):
        return functools.partial(pipeline.run, pace)
    return Conductor(pipeline, pace).run


def _attributes(model: keras.Model) -> dict[tuple[int, str], Any]:
    """Returns the settings of layers and optimizer: numbers, texts, flags."""
    parts = [*_keras.layers_within(model)[1:], model.optimizer]
    plain = (bool, int, float, str, type(None))
    return {
        (id(part), name): value
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, plain)
    }
