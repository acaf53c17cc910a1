"""What the last stage does beyond its layers: the loss and the metrics."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.boundaries import Boundary
from fdg_keras.checks import OutsideRead, check_reads
from fdg_keras.data import Spec
from fdg_keras.slicing import Graph, Slice


class Objective:
    """The compiled loss and metrics of a model.

    A batch's targets come as a flat tuple, straight from the feeder: the
    tensors of `y`, those of `sample_weight`, and last the batch size as an
    `int32` scalar, by which Keras weights the mean of the reported loss.

    Args:
        model: A compiled model.
        graph: The same model, as a graph.
        slices: Its stages.
        spec: Of the batches.
    """

    def __init__(
        self,
        model: keras.Model,
        graph: Graph,
        slices: Sequence[Slice],
        spec: Spec,
    ):
        self._model = model
        self._graph = graph
        self._structure = (spec.y, spec.sample_weight)
        # Metrics that layers of earlier stages keep are on other devices.
        self._elsewhere = {
            id(metric)
            for part in slices[:-1]
            for layer in part.layers
            for metric in layer.metrics
        }
        self.target_specs = [
            *(s for s in tf.nest.flatten(self._structure) if s is not None),
            tf.TensorSpec((), tf.int32),
        ]
        if _keras.compiled_loss(model) is not None and spec.y is None:
            raise ValueError(
                "No targets for the loss. Expected targets to compare the "
                "outputs with, as `y` or in the data set, because the model "
                f"was compiled with loss={model.loss!r}. Received: y=None. "
                "Pass targets, or compile the model without a loss if its "
                "layers add losses of their own."
            )
        # Of any batch size, whatever the model says of it: as Keras.
        symbols = [
            keras.KerasTensor([None] * bool(s.shape) + [*s.shape[1:]], s.dtype)
            for s in (graph.symbols[v] for v in graph.outputs)
        ]
        with self.fitting():
            _keras.build_losses_and_metrics(
                model,
                _symbolic(spec.y),
                _keras.pack_outputs(graph.functional, symbols),
                _symbolic(spec.sample_weight),
            )

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """Says what was expected if targets do not fit loss or metrics."""
        try:
            yield
        except OutsideRead:
            raise
        except (ValueError, TypeError) as error:
            outputs = [
                tuple(self._graph.symbols[v].shape) for v in self._graph.outputs
            ]
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                "The targets do not fit the compiled loss or metrics: "
                f"expected targets for outputs of shape {outputs}, received "
                f"y and sample weights {self._structure}. Keras said: {error}"
            ) from error

    def update(
        self,
        boundary: Boundary,
        sent: Sequence[tf.Tensor],
        own_loss: tf.Tensor | None,
        targets: Sequence[tf.Tensor],
        training: bool,
    ) -> list[tf.Tensor | None]:
        """Updates the metrics and returns the gradient of the loss.

        Args:
            boundary: What the last stage sends: the model's outputs in order,
                each `[B, ...]`, and the logits that some were made of.
            sent: That.
            own_loss: Sum of the losses that layers of any stage add, a
                scalar, or `None`.
            targets: Flat targets, as above.
            training: Whether gradients are wanted.

        Returns:
            For each output, and then for the logits of those that have some,
            the gradient of the compiled loss with respect to it, or `None` if
            it has none; an empty list if not `training`.

        Raises:
            ValueError: If there is no loss, or the targets do not fit it.
        """
        *flat, batch_size = targets
        rest = iter(flat)
        y, sample_weight = tf.nest.map_structure(
            lambda spec: None if spec is None else next(rest), self._structure
        )
        sources = boundary.floating(sent)
        with tf.GradientTape() as tape:
            tape.watch([t for t in sources if t.dtype.is_floating])
            outputs = boundary.attach(sent)
            y_pred = _keras.pack_outputs(self._graph.functional, outputs)
            compiled = _keras.compiled_loss(self._model)
            loss = compiled and compiled(y, y_pred, sample_weight)
        if training:
            self.check_reads("The loss", tape.watched_variables())
        gradients: list = []
        if training and loss is not None:
            gradients = tape.gradient(loss, sources)
        elif training:
            gradients = [None] * len(sources)
        loss = self._total(loss, own_loss)
        _keras.loss_tracker(self._model).update_state(
            loss, sample_weight=batch_size
        )
        with tf.GradientTape() as seen:
            self._model.compute_metrics(None, y, y_pred, sample_weight)
        if training:
            self.check_reads("A metric", seen.watched_variables())
        return [
            None if g is None else tf.convert_to_tensor(g) for g in gradients
        ]

    def check_reads(self, where: str, read: Sequence[tf.Variable]) -> None:
        """Checks that nobody reads what is not handed to him and changes.

        See `checks.check_reads`.
        """
        if not read:
            return  # Eagerly, this is asked for each batch.
        # Keras computes their results whenever it updates one.
        metrics = {
            id(_keras.get_storage(v))
            for metric in self._model.metrics
            for v in metric.variables
        }
        others = [v for v in read if id(v) not in metrics]
        check_reads(where, others, self._graph, self._model.optimizer)

    def results(self) -> dict[str, tf.Tensor]:
        """Returns the values so far of all metrics on the last stage."""
        found: dict[str, tf.Tensor] = {}
        for metric in self._model.metrics:
            if id(metric) not in self._elsewhere:
                value = metric.result()
                named = isinstance(value, dict)
                found.update(value if named else {metric.name: value})
        return found

    def _total(
        self, loss: tf.Tensor | None, own_loss: tf.Tensor | None
    ) -> tf.Tensor:
        if loss is None and own_loss is None:
            raise ValueError(
                "No loss to compute. Expected a `loss` in `compile()`, or "
                "layers that add losses of their own. Received: "
                f"loss={self._model.loss!r}. Pass a loss to `compile()`."
            )
        if loss is None or own_loss is None:
            return own_loss if loss is None else loss
        return loss + tf.cast(own_loss, loss.dtype)


def _symbolic(specs: Any) -> Any:
    """Returns `KerasTensor`s for nested specs."""
    return tf.nest.map_structure(
        lambda s: s and keras.KerasTensor(s.shape, s.dtype.name), specs
    )
