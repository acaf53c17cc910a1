"""Batches: from anything `keras.Model.fit` takes.

Keras' own data adapters turn arrays, `tf.data`, `PyDataset` and generators
into one `tf.data.Dataset`. Its elements are brought into the order the stages
need; `feeds` moves them into links.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.slicing import Graph
from fdg_keras.threads import warn

_EMPTY = (
    "The data set is empty: expected at least one batch, received none. A "
    "`tf.data.Dataset` or generator that was used up yields nothing the second "
    "time."
)


class Spec(NamedTuple):
    """Shapes and dtypes of a batch.

    Attributes:
        inputs: One spec for each model input, `[B, ...]`.
        y: Nested specs of the targets, or `None`.
        sample_weight: Nested specs, or `None`.
    """

    inputs: tuple[tf.TensorSpec, ...]
    y: Any
    sample_weight: Any


class Batches:
    """The batches of one `fit`, `evaluate` or `predict`.

    Elements of `dataset` are pairs of flat tuples: the model's inputs as the
    model wants them, and the targets as `Objective` wants them.

    A `tf.data.Dataset` is read on the machine that it was made on, and is not
    tuned while it is read unless its options say so: where it leaves a number
    to TensorFlow, that is the number of cores.

    Args:
        graph: The model.
        steps_per_epoch: Batches to draw in each epoch; the iterator then goes
            on where it was. `None` draws all.
        **data: As `keras.Model.fit` takes them: `x`, `y`, `sample_weight`,
            `batch_size`, `shuffle`, `class_weight`.

    Raises:
        ValueError: If shapes do not fit the model's inputs, or if the data are
            sparse or ragged.
    """

    def __init__(
        self, graph: Graph, steps_per_epoch: int | None = None, **data: Any
    ):
        if data.get("x") is None:
            raise ValueError(
                "Expected data: arrays, a `tf.data.Dataset`, a `PyDataset` or "
                "a generator. Received: x=None"
            )
        limit = keras.config.max_steps_per_epoch()
        if limit and (not steps_per_epoch or limit < steps_per_epoch):
            warn(f"Limiting steps_per_epoch to {limit}")
            steps_per_epoch = limit
        self._steps_per_epoch = steps_per_epoch
        self._device = _keras.device_of(data["x"])
        self._failures: list[BaseException] = []
        with self._there():
            self._adapter = _keras.get_data_adapter(
                steps_per_epoch=steps_per_epoch, **data
            )
            _keras.remember_failures(self._adapter, self._failures)
            dataset = self._adapter.get_tf_dataset()
        _check_dense(dataset.element_spec)

        x_spec, y, weight = keras.utils.unpack_x_y_sample_weight(
            dataset.element_spec
        )
        _check_present(x_spec)
        _keras.check_names(graph.functional, x_spec)
        in_tuples = isinstance(dataset.element_spec, tuple)

        present = [
            spec is not None
            for spec in tf.nest.flatten(_tensors_only((y, weight)))
        ]

        def arrange(*element: Any) -> tuple[tuple, tuple]:
            x, y, weight = keras.utils.unpack_x_y_sample_weight(
                element if in_tuples else element[0]
            )
            inputs = _keras.standardize_inputs(graph.functional, x)
            size = tf.shape(inputs[0])[0]
            targets = itertools.compress(tf.nest.flatten((y, weight)), present)
            return tuple(inputs), (*targets, size)

        try:
            with self._there():
                self.dataset = _untuned(dataset.map(arrange))
        except ValueError as error:
            raise ValueError(_misfit(graph, dataset.element_spec)) from error
        inputs, _ = self.dataset.element_spec
        self.spec = Spec(inputs, _tensors_only(y), _tensors_only(weight))
        _check_shapes(inputs, graph)
        self._iterator: Any = None
        self._length = self._known
        if self._known == 0:
            raise ValueError(_EMPTY)

    def _there(self) -> contextlib.AbstractContextManager:
        """Makes things where the data set is: maybe on another machine."""
        if self._device is None:
            return contextlib.nullcontext()
        return tf.device(self._device)

    @property
    def _known(self) -> int | None:
        """Batches of an epoch, as the data tell."""
        with self._there():
            return self._adapter.num_batches

    def _open(self) -> None:
        with self._there():
            self._iterator = iter(self.dataset)
        self._drawn = 0

    @property
    def steps(self) -> int | None:
        """Batches of an epoch, or `None` if that is not known yet."""
        return self._steps_per_epoch or self._length

    def reset(self) -> None:
        """Lets the next epoch begin with the first batch.

        A `PyDataset` is told that an epoch has ended, as Keras tells it before
        `fit` and `evaluate` begin: one that shuffles then has done so.
        """
        self._adapter.on_epoch_end()
        self._iterator = None

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch, if that is known before it is drawn."""
        return self._adapter.batch_size

    @contextlib.contextmanager
    def epoch(self) -> Iterator["Epoch"]:
        """Opens an epoch; say in it how many batches were drawn.

        Raises:
            ValueError: On leaving, if there were none.
        """
        self._adapter.on_epoch_begin()
        if self._iterator is None or not self._steps_per_epoch:
            self._open()
        self._failures.clear()
        limit, known = self.steps, self._known
        if limit and known:
            # As Keras: no batch begins that is known not to come.
            limit = min(limit, known - self._drawn)
        epoch = Epoch(self._iterator, limit, self._failures)
        try:
            yield epoch
        finally:
            self._adapter.on_epoch_end()
        self._account(epoch.drawn, epoch.stopped)

    def _account(self, drawn: int, stopped: bool) -> None:
        self._drawn += drawn
        if self._drawn == 0:
            raise ValueError(_EMPTY)
        short = self.steps is not None and drawn < self.steps
        if short and not stopped:
            warn(
                "Your input ran out of data; interrupting training. Expected "
                f"{self.steps} batches in this epoch, received {drawn}. Use "
                "`.repeat()` on the data set, or fewer `steps_per_epoch`."
            )
        if self._length is None and not self._steps_per_epoch and not stopped:
            self._length = drawn
        used_up = self._length and self._drawn >= self._length
        if short or used_up:
            self._iterator = None
        if used_up and self._known and not stopped:
            # As Keras does, also where it opens another one when the next
            # epoch begins: each opening shuffles a data set anew.
            self._open()


def _untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns a data set that is not tuned while it is read.

    Unless its options say so. The thread that tunes it may miss that the
    iterator is deleted, which waits for it in its sleep: up to a minute in
    which Python stands still, at the end of a `fit` and on Ctrl-C.
    """
    options = tf.data.Options()
    if dataset.options().autotune.enabled is None:
        options.autotune.enabled = False
    return dataset.with_options(options)


def build_for(model: Any, x: Any) -> None:
    """Builds a Sequential without an input shape, as `keras.Model.fit` does.

    One that has to draw a batch for it (from a generator, say) would lose that
    batch: then, or if `x` is not one tensor, the model is left as it is.

    Args:
        model: Anything; only a Sequential that is not built is changed.
        x: As `keras.Model.fit` takes it.
    """
    if not isinstance(model, keras.Sequential) or model.built:
        return
    batch_size = None
    if isinstance(x, tf.data.Dataset):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(x.element_spec)
        batch_size = getattr(x, "shape", [None])[0]
    elif isinstance(x, keras.utils.PyDataset):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(x[0])
    shape = getattr(x, "shape", None)
    if shape is not None and len(shape) > 0:
        model.build((batch_size, *shape[1:]))


def validation_batches(
    graph: Graph, data: Any, steps: int | None, batch_size: int | None
) -> Batches | None:
    """Returns the batches of `fit(validation_data=data)`, if there are any."""
    if data is None:
        return None
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return Batches(
        graph,
        steps,
        x=x,
        y=y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        shuffle=False,
    )


@dataclass
class Epoch:
    """One pass over some batches.

    Attributes:
        iterator: Yields them.
        limit: How many to draw at most, or `None`.
        failures: What Python code has raised that makes the batches.
        drawn: How many were drawn; set by who draws.
        drawn_before: How many were when it was last paused; likewise.
        stopped: Whether drawing was stopped on purpose; likewise.
    """

    iterator: Any
    limit: int | None
    failures: list[BaseException] = field(default_factory=list)
    drawn: int = 0
    drawn_before: int = 0
    stopped: bool = False

    def stretches(
        self, until_pause: Callable[[], int | None]
    ) -> Iterator[int | None]:
        """Divides the epoch where all stages are to drain.

        Args:
            until_pause: Says after how many more batches that is.

        Yields:
            How many batches to run at most, `None` for all there are.
        """
        more = True
        while more and not self.stopped and self.drawn != self.limit:
            self.drawn_before = self.drawn
            left = self.limit and self.limit - self.drawn
            limits = [n for n in (left, until_pause()) if n is not None]
            limit = min(limits, default=None)
            yield limit
            more = self.drawn - self.drawn_before == limit

    @contextlib.contextmanager
    def original_failure(self) -> Iterator[None]:
        """Raises what a generator raised in place of TensorFlow's account."""
        try:
            yield
        except tf.errors.OpError as error:
            if self.failures:
                raise self.failures[0] from error
            raise


def _tensors_only(specs: Any) -> Any:
    """Returns specs with `None` for what stands for an absent tensor."""
    return tf.nest.map_structure(
        lambda s: s if isinstance(s, tf.TensorSpec) else None, specs
    )


def _check_dense(specs: Any) -> None:
    for spec in tf.nest.flatten(specs):
        if isinstance(spec, (tf.SparseTensorSpec, tf.RaggedTensorSpec)):
            raise ValueError(
                "Expected dense tensors. Convert the data with "
                "`tf.sparse.to_dense` or `.to_tensor()` before training. "
                f"Received: {spec}"
            )


def _check_present(inputs: Any) -> None:
    for spec in tf.nest.flatten(inputs):
        if not isinstance(spec, tf.TensorSpec):
            raise ValueError(
                "Expected a tensor for each of the model's inputs. Optional "
                "inputs are not supported: pass zeros, say, or make a model "
                f"without them. Received: inputs of {inputs}"
            )


def _misfit(graph: Graph, received: Any) -> str:
    wanted = [
        f"{graph.symbols[v].name!r} {tuple(graph.symbols[v].shape)}"
        for v in graph.inputs
    ]
    return (
        "The data do not fit the model's inputs: expected batches for "
        f"{', '.join(wanted)}, received {received}. A `tf.data.Dataset` must "
        "be batched (`.batch(...)`); inputs come as a list in this order or "
        "as a dictionary."
    )


def _check_shapes(inputs: Sequence[tf.TensorSpec], graph: Graph) -> None:
    if len(inputs) != len(graph.inputs):
        names = [graph.symbols[value].name for value in graph.inputs]
        raise ValueError(
            "The data do not fit the model: expected one tensor for each of "
            f"the inputs {names}, as a list in this order or as a dictionary, "
            f"received {len(inputs)} of shapes "
            f"{[tuple(spec.shape) for spec in inputs]}."
        )
    for spec, value in zip(inputs, graph.inputs):
        symbol = graph.symbols[value]
        # As Keras, which does not look at a batch size that the model gives.
        if not spec.shape[1:].is_compatible_with(symbol.shape[1:]):
            raise ValueError(
                f"The data do not fit the model's input {symbol.name!r}: "
                f"expected batches of shape {tuple(symbol.shape)}. Reshape the "
                "data, or build the model for them. Received: "
                f"{tuple(spec.shape)}"
            )
