"""Passes over the data as Keras makes them: hooks, metrics, results."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from fdg_keras import _keras
from fdg_keras.data import Batches
from fdg_keras.deployment import Deployment, Mode
from fdg_keras.hooks import Hooks, as_floats, validates
from fdg_keras.slicing import Graph
from fdg_keras.threads import noting


def train(
    deployment: Deployment,
    batches: Batches,
    validation: Batches | None,
    hooks: Hooks,
    initial_epoch: int,
    epochs: int,
    validation_freq: Any,
) -> keras.callbacks.History:
    """Runs the epochs of `fit`, within the context of the deployment."""
    model = deployment.model
    logs: dict[str, Any] | None = None

    def end(batch: int, metrics: dict) -> bool:
        hooks.end("train", batch, as_floats(metrics))
        return model.stop_training

    model.stop_training = False
    hooks.call("on_train_begin")
    first = _keras.initial_epoch_of(model) or initial_epoch
    for epoch in range(first, epochs):
        with noting(f"in epoch {epoch + 1} of {epochs}"):
            model.reset_metrics()
            hooks.call("on_epoch_begin", epoch)
            _run(deployment, "train", batches, hooks, end)
            logs = as_floats(model.get_metrics_result())
            if validation is not None and validates(epoch, validation_freq):
                tested = test(deployment, validation, hooks)
                logs.update({f"val_{k}": v for k, v in tested.items()})
            hooks.call("on_epoch_end", epoch, logs)
        if model.stop_training:
            break
    if epochs > 0:
        model.optimizer.finalize_variable_values(model.trainable_weights)
    hooks.call("on_train_end", logs=logs)
    return model.history


def test(
    deployment: Deployment, batches: Batches, hooks: Hooks
) -> dict[str, Any]:
    """Runs `evaluate`, or the validation of `fit`, within the context."""
    model = deployment.model
    model.stop_evaluating = False
    then: dict[str, Any] = {}

    def end(batch: int, metrics: dict) -> bool:
        hooks.end("test", batch, as_floats(metrics))
        if model.stop_evaluating:
            # Batches that are in the stages still run, but do not count.
            then.update(as_floats(metrics))
        return model.stop_evaluating

    hooks.call("on_test_begin")
    model.reset_metrics()
    batches.reset()
    _run(deployment, "test", batches, hooks, end)
    # Keras sorts those of `evaluate`, and only those.
    logs = as_floats(model.get_metrics_result()) | then
    logs = dict(sorted(logs.items()))
    hooks.call("on_test_end", logs)
    return logs


def predict(
    deployment: Deployment, graph: Graph, batches: Batches, hooks: Hooks
) -> Any:
    """Runs `predict`, within the context; returns what Keras would."""
    model = deployment.model
    pipeline = deployment.build("predict", batches.spec).pipeline
    parts: list[list[np.ndarray]] = []
    model.stop_predicting = False

    def end(batch: int, _: dict) -> bool:
        new = [pipeline.output() for _ in range(batch + 1 - len(parts))]
        parts.extend([tensor.numpy() for tensor in part] for part in new)
        outputs = _packed(graph, parts[-len(new) :])
        hooks.end("predict", batch, {"outputs": outputs})
        return model.stop_predicting

    hooks.call("on_predict_begin")
    _run(deployment, "predict", batches, hooks, end)
    pipeline.forget_outputs()
    hooks.call("on_predict_end")
    return _packed(graph, parts)


def _packed(graph: Graph, parts: Sequence[Sequence[np.ndarray]]) -> Any:
    """Returns flat outputs of batches as the model's outputs."""
    count = len(graph.outputs)  # masks may follow
    whole = [np.concatenate(column) for column in list(zip(*parts))[:count]]
    return _keras.pack_outputs(graph.functional, whole)


def _run(
    deployment: Deployment,
    mode: Mode,
    batches: Batches,
    hooks: Hooks,
    end: Callable[[int, dict], bool],
) -> None:
    def begin(batch: int) -> None:
        hooks.begin(mode, batch)

    hooks.start_epoch()
    deployment.run(
        mode, batches, hooks.pace(mode), begin, end, hooks.until_pause
    )
