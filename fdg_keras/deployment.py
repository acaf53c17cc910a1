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
from fdg_keras.objective import Objective
from fdg_keras.optimizers import StageOptimizers
from fdg_keras.pipeline import Pipeline, Settings
from fdg_keras.placement import Relocation
from fdg_keras.slicing import Graph, Slice
from fdg_keras.statistics import StageStatistics
from fdg_keras.threads import uninterrupted
from fdg_keras.watch import Watch

Mode = Literal["train", "test", "predict"]

# Where a Keras model keeps what it has compiled.
_FUNCTIONS = ("train_function", "test_function", "predict_function")


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
        self.watch = Watch(devices)
        self._relocation = Relocation(may_be_lost=self.watch.is_needed)
        self._saved_steps: int | None = None
        self._built: dict[Mode, Built] = {}
        self._left: list[Pipeline | Emulation] = []
        self._jit_compile = False
        self._functions: dict[str, Any] = {}
        # As they were when training was built, until the first epoch of it.
        self._attributes: dict | None = None
        self.statistics: list[StageStatistics] = []

    def __enter__(self) -> "Deployment":
        try:
            with uninterrupted():
                self._enter()
        except KeyboardInterrupt:
            # Put off until now, and so it is not the `with` block that leaves.
            self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        model = self.model
        if not self._relocation.is_away:
            check_idle(model)  # Others may have its variables.
            self.watch.__enter__()
            self._saved_steps = None
            # What the model compiled, it compiled for its variables at home;
            # and XLA refuses variables that are spread over devices.
            self._jit_compile = bool(model.jit_compile)
            self._functions = {n: getattr(model, n) for n in _FUNCTIONS}
            self._set_functions(dict.fromkeys(_FUNCTIONS), False)
            vars(model)["make_train_function"] = _refuse_to_train
        try:
            self._relocation.__enter__()
        except tf.errors.OpError as error:
            # A worker was lost while the model was at home.
            loss = self._abandon()
            self._settle()
            raise (loss or error) from error

    def __exit__(self, *details: Any) -> None:
        error = details[1] if details else None
        with uninterrupted():
            loss = self._leave(error)
            if not self._relocation.is_away:
                self._settle()
        if loss is None:
            return
        if error is None or isinstance(error, tf.errors.OpError):
            raise loss from error
        error.add_note(str(loss))

    def _leave(self, error: BaseException | None) -> ConnectionError | None:
        """Brings variables home; returns what is to be said of lost workers."""
        fails = self.watch.is_needed and error is not None
        if fails and self.watch.find_loss() is not None:
            return self._abandon()
        try:
            self._relocation.__exit__()
        except tf.errors.OpError:
            loss = self._abandon()
            if loss is None:
                self._settle()
                raise
            return loss
        return None

    def _abandon(self) -> ConnectionError | None:
        """Gives up what is on the workers, with one of them lost.

        All variables get the values they had at the end of the last epoch, so
        that they belong together.
        """
        loss = self.watch.find_loss()
        if loss is not None:
            loss.add_note(
                "The model holds the weights and slots of the end of the last "
                "epoch, or of the begin of `fit` if none has ended."
            )
        self._relocation.abandon()
        built = self._built.get("train")
        if built and built.optimizers and self._saved_steps is not None:
            built.optimizers.steps = self._saved_steps
        # While calls to lost workers fail at once, and do not block.
        self._built.clear()
        self._left.clear()
        gc.collect()
        return loss

    def _settle(self) -> None:
        """Undoes what else was done for variables to be away."""
        self.watch.__exit__()
        self._set_functions(self._functions, self._jit_compile)
        vars(self.model).pop("make_train_function", None)

    def _set_functions(self, functions: dict, jit_compile: bool) -> None:
        for name, function in functions.items():
            setattr(self.model, name, function)
        self.model.jit_compile = jit_compile

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
            if self._saved_steps is None:
                self._save(optimizers)
            try:
                self.statistics = run(
                    epoch, rate, begin, counted_end, until_pause
                )
            except BaseException:
                # It is not to be hidden by another one of a lost worker.
                with contextlib.suppress(tf.errors.OpError):
                    optimizers.push()
                raise
            optimizers.push()
            self._save(optimizers)

    def _save(self, optimizers: StageOptimizers) -> None:
        """Keeps what is left if a worker is lost, in case there are any."""
        if self.watch.is_needed:
            self._relocation.save()
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
                self._relocation,
            )
        parts = (
            self._graph,
            self._slices,
            self._devices,
            self._settings if mode == "train" else None,
            optimizers.stages if optimizers else [],
            objective,
        )
        if model.run_eagerly or (self._emulate and mode == "train"):
            return Emulation(*parts, model.run_eagerly), optimizers
        pipeline = Pipeline(*parts, spec, self._jit_compile, probed)
        return pipeline, optimizers

    def _relocate(self) -> None:
        """Moves the variables of layers and metrics to their stages."""
        for part, device in zip(self._slices, self._devices):
            for variable in part.trainable_variables + part.state_variables:
                self._relocation.move(variable, device)
        for metric in self.model.metrics:
            for variable in metric.variables:
                self._relocation.move(variable, self._devices[-1])


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


def check_idle(model: keras.Model) -> None:
    """Checks that a model is not in stages now, to be used by others.

    Raises:
        ValueError: If it is.
    """
    if vars(model).get("make_train_function") is _refuse_to_train:
        _refuse_to_train()


def _refuse_to_train(force: bool = False) -> None:
    raise ValueError(
        "A model cannot be trained within `fdg_keras.fit`, by a callback or "
        "another thread say, nor run by another `Trainer`: its variables are "
        "on the devices of their stages. Expected that to be done before or "
        "after it; `evaluate` and `predict` of the model and of its `Trainer` "
        "may be called. Received: a call meanwhile"
    )
