"""`Trainer`: a Keras model, sliced, with Keras' contract of `fit`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import keras

from fdg_keras import _keras, advice, passes, planning, transforms
from fdg_keras.corrections import Correction, check_corrections
from fdg_keras.crossing import Stash
from fdg_keras.data import Batches, build_for, validation_batches
from fdg_keras.delays import Order
from fdg_keras.deployment import Deployment
from fdg_keras.hooks import Hooks, ask_for_probes, capped_epochs
from fdg_keras.loans import check_idle
from fdg_keras.pipeline import Settings
from fdg_keras.placement import resolve_devices
from fdg_keras.plans import Plan
from fdg_keras.slicing import cut_graph, trace_graph
from fdg_keras.statistics import StageStatistics, Totals
from fdg_keras.threads import warn
from fdg_keras.transforms import GradientTransformer
from fdg_keras.validation import (
    check_emulation,
    check_epochs,
    check_graph,
    check_model,
    check_settings,
    check_sizes,
    warn_if_gradients_are_apart,
    warn_if_shrinking_is_futile,
)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _watched(method: _Method) -> _Method:
    """Has workers looked after from the begin of a method to its end."""

    @functools.wraps(method)
    def watched(self: "Trainer", *args: Any, **kwargs: Any) -> Any:
        # Even the data compile functions, which every worker is told of.
        with self._deployment.watch:
            return method(self, *args, **kwargs)

    return cast(_Method, watched)


class Trainer:
    """Trains a Keras model in stages, fully decoupled by delayed gradients.

    The model is sliced into K consecutive stages, each on its own device and
    trained by its own thread. Stage k (k = 0 ... K-1) updates its weights with
    gradients that are `d_k = delay * (K - 1 - k)` batches late:

        w_k[t+1] = w_k[t] - lr * beta**(K-1-k) * g_k[t-d_k],
        g_k[b] = the gradient for batch b at w_k[b],

    with the optimizer the model was compiled with in place of plain SGD, and
    beta = `shrink`. Source: arXiv 1906.09108, there with modules counted from
    1 and `delay=2`. While it trains, each stage's variables live on that
    stage's device; afterwards the model holds the trained values where its
    variables were before, and `model.optimizer` holds the slots.

    Args:
        model: A compiled Functional or Sequential model. Its `compile()` gives
            optimizer, loss, metrics and `steps_per_execution`.
        splits: Number of stages K, cut where their estimated costs balance,
            alike on every machine; or a list of names of layers to cut after;
            or a `Plan`, such as `fdg_keras.plan` makes by measuring.
        devices: Device names as `tf.device` takes them. Fewer than stages are
            dealt round robin, with a warning. Default: all GPUs, or all
            logical CPUs if there is none.
        delay: Batches of delay per hop, 0, 1, 2, ...: 0 is back-propagation,
            locked, equal to `model.fit`; 1 is DDG; 2, the default, is FDG, and
            ADL if the optimizer has `gradient_accumulation_steps`.
        shrink: Factor in (0, 1] by which a gradient is multiplied at each hop,
            or a `GradientTransformer`. Default 1, no shrinking.
        stash: What a stage keeps of a batch from its forward to its backward.
            `"exact"` (default) keeps what makes the backward that of the
            forward's weights: the paper's equation. `"selective"` computes
            the same, keeps of it what is expensive, such as the outputs of
            convolutions, and runs what is cheap again (see `recompute`).
            `"current"` keeps only activations and uses today's weights.
            `"replay"` keeps the stage's inputs and runs the forward again,
            with today's weights: the least memory.
        order: `"forward_first"` (default) runs, at each tick, the forward of
            a batch and then the backward and update of an earlier one, as the
            paper's text does. `"update_first"` does it the other way round,
            as the paper's published code does, with one update less staleness.
        corrections: For the staleness of a stage's gradients, in this order:
            `WeightPrediction`, `DelayCompensation`,
            `LearningRateRescheduling`. Default: none.
        emulate: Train on one device, the first, one stage after the other:
            the same training as on K devices at the cost of back-propagation,
            to choose K, delay and shrink before there is a second device.
            Needs `stash="exact"` or `"selective"`. A model compiled with
            `run_eagerly=True` is trained so in any case, eagerly and in the
            caller's thread.

    Attributes:
        model: The model.
        settings: Its `delay`, `order`, `stash`, gradient `transform` (what
            `shrink` stands for) and `corrections`.

    Raises:
        ValueError: If the model cannot be sliced this way, or an argument is
            out of range. The message says what was expected and what to do.
    """

    def __init__(
        self,
        model: keras.Model,
        splits: int | Sequence[str] | Plan = 2,
        devices: Sequence[str] | None = None,
        delay: int = 2,
        shrink: float | GradientTransformer = 1.0,
        stash: Stash = "exact",
        order: Order = "forward_first",
        corrections: Sequence[Correction] = (),
        emulate: bool = False,
    ):
        check_settings(delay, stash, order)
        transform = transforms.get(shrink)
        check_model(model)
        corrected = check_corrections(corrections, model.optimizer, stash)
        self.model = model
        self._graph = graph = trace_graph(model)
        cuts = planning.choose_cuts(graph, splits)
        count = len(cuts) + 1
        names = (
            resolve_devices(devices, 1) * count
            if emulate
            else resolve_devices(devices, count)
        )
        slices = cut_graph(graph, cuts)
        self._plan = planning.make_plan(graph, slices, names)
        if isinstance(splits, Plan):
            self._plan = advice.without_measured(splits).on(names)
        self.settings = Settings(int(delay), order, stash, transform, corrected)
        self._batch_size: int | None = None  # of the last `fit`
        self._warned: set[type] = set()
        self._warn_once()
        self._emulate = emulate
        self._deployment = Deployment(
            model, graph, slices, names, self.settings, emulate
        )

    @_watched
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: Any = 1,
    ) -> keras.callbacks.History:
        """Trains the model; takes what `keras.Model.fit` takes.

        All stages drain at the end of each epoch, so validation, callbacks
        and checkpoints see every batch applied. Within an epoch callbacks see
        the metrics of the last stage.

        Returns:
            The `History`, as `keras.Model.fit` does.

        Raises:
            ValueError: If the data do not fit the model, or are empty.
        """
        check_model(self.model)
        check_graph(self.model, self._graph)
        check_corrections(
            self.settings.corrections,
            self.model.optimizer,
            self.settings.stash,
        )
        self._warn_once()
        check_idle(self.model)
        check_emulation(self.model, self._emulate, self.settings.stash)
        if self._emulate and verbose:
            print(f"Emulating {len(self._plan.stages)} stages, one by one.")
        check_sizes(
            batch_size,
            steps_per_epoch,
            validation_batch_size,
            validation_steps,
            validation_split,
            validation_freq,
        )
        check_epochs(epochs, initial_epoch)
        epochs = capped_epochs(epochs)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = (
                _keras.train_validation_split(
                    (x, y, sample_weight), validation_split
                )
            )
        batches = Batches(
            self._graph,
            steps_per_epoch,
            x=x,
            y=y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            shuffle=shuffle,
            class_weight=class_weight,
        )
        validation = validation_batches(
            self._graph,
            validation_data,
            validation_steps,
            validation_batch_size or batch_size,
        )
        self._batch_size = batches.batch_size
        self._deployment.totals = Totals()
        batches.reset()
        with self._deployment:
            # Slots exist and are in place before callbacks look at them.
            self._deployment.build(
                "train", batches.spec, ask_for_probes(callbacks)
            )
            if validation is not None:
                # Or else what does not fit would fail after an epoch.
                self._deployment.build("test", validation.spec)
            hooks = Hooks(
                self.model, callbacks, verbose, epochs, batches.steps, True
            )
            if self._is_in_motion:
                hooks.warn_of_motion(self.settings.delay)
            with hooks.introduced(self):
                return passes.train(
                    self._deployment,
                    batches,
                    validation,
                    hooks,
                    initial_epoch,
                    epochs,
                    validation_freq,
                )

    def _warn_once(self) -> None:
        """Warns of what is futile, once for each optimizer compiled with."""
        kind = type(self.model.optimizer)
        if kind not in self._warned:
            self._warned.add(kind)
            if not self.model.trainable_weights:  # As Keras.
                warn("The model does not have any trainable weights.")
            warn_if_shrinking_is_futile(self.settings.transform, self.model)
            warn_if_gradients_are_apart(self.model, len(self._plan.stages))

    @property
    def plan(self) -> Plan:
        """Which layers are on which device, and what they cost.

        After `fit`, each stage has its `measured_s`: how long it computed in
        a tick of that `fit`, and the plan its `measured_step_s`. The first
        epoch is left out if there were others. Then its `advice` says whether
        a cut is worth moving, and where to, if there were ticks enough. It also
        says so if the plan was made for another batch, delay or stash. Stages
        that no `Plan` was given for have the bytes that they send and stash of
        such batches as were trained, unless they were emulated.
        """
        batch_size, settings = self._batch_size, self.settings
        how = batch_size, settings.delay, settings.stash
        plan = advice.with_settings(self._plan, *how)
        if batch_size:
            held = self._deployment.held_bytes(batch_size)
            plan = advice.with_held(plan, held, *how)
        usages = self._deployment.totals.usages
        ticks = min((usage.ticks for usage in usages), default=0)
        if not ticks:
            return plan
        measured = advice.Measured(
            [usage.computed / usage.ticks for usage in usages],
            max(usage.total / usage.ticks for usage in usages),
            ticks,
        )
        return advice.with_measured(self._graph, plan, measured)

    @property
    def _is_in_motion(self) -> bool:
        """Whether stages train other batches than callbacks are told of."""
        staged = len(self._plan.stages) > 1 and not self._emulate
        return bool(
            staged and self.settings.delay and not self.model.run_eagerly
        )

    @property
    def statistics(self) -> list[StageStatistics]:
        """What each stage did in the last epoch of `fit`.

        Empty before there was one, and if the stages were emulated.
        """
        return self._deployment.statistics

    @_watched
    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """Computes loss and metrics, pipelined through the stages.

        Takes and returns what `keras.Model.evaluate` does.
        """
        check_model(self.model)
        check_graph(self.model, self._graph)
        check_sizes(batch_size, steps=steps)
        batches = Batches(
            self._graph,
            steps,
            x=x,
            y=y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            shuffle=False,
        )
        with self._deployment:
            hooks = Hooks(self.model, callbacks, verbose, 1, batches.steps)
            logs = passes.test(self._deployment, batches, hooks)
        if return_dict:
            return logs
        return _keras.in_order_of_metrics(self.model, logs)

    @_watched
    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Computes the model's outputs, pipelined through the stages.

        Takes and returns what `keras.Model.predict` does: NumPy arrays
        `[N, ...]` in the structure of the model's outputs.
        """
        check_graph(self.model, self._graph)
        check_sizes(batch_size, steps=steps)
        batches = Batches(
            self._graph, steps, x=x, batch_size=batch_size, shuffle=False
        )
        hooks = Hooks(self.model, callbacks, verbose, 1, batches.steps)
        with self._deployment:
            return passes.predict(self._deployment, self._graph, batches, hooks)


def fit(
    model: keras.Model,
    *args: Any,
    splits: int | Sequence[str] | Plan = 2,
    devices: Sequence[str] | None = None,
    delay: int = 2,
    shrink: float | GradientTransformer = 1.0,
    stash: Stash = "exact",
    order: Order = "forward_first",
    corrections: Sequence[Correction] = (),
    emulate: bool = False,
    **kwargs: Any,
) -> keras.callbacks.History:
    """Trains `model` in stages: `Trainer(model, ...).fit(...)`.

    Args:
        model: A compiled Functional or Sequential model. A Sequential without
            an input shape is built for the data, unless they are a generator.
        *args: As `keras.Model.fit` takes them.
        splits: See `Trainer`, here and below.
        devices: See `Trainer`.
        delay: See `Trainer`.
        shrink: See `Trainer`.
        stash: See `Trainer`.
        order: See `Trainer`.
        corrections: See `Trainer`.
        emulate: See `Trainer`.
        **kwargs: As `keras.Model.fit` takes them.

    Returns:
        The `History`, as `keras.Model.fit` does.

    Raises:
        ValueError: As `Trainer` and `Trainer.fit` do.
    """
    build_for(model, args[0] if args else kwargs.get("x"))
    trainer = Trainer(
        model,
        splits,
        devices,
        delay,
        shrink,
        stash,
        order,
        corrections,
        emulate,
    )
    return trainer.fit(*args, **kwargs)
