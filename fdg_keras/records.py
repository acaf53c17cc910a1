"""A run as plain data, and files that are whole at any moment."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fdg_keras.pipeline import Settings
from fdg_keras.plans import HERE, Plan
from fdg_keras.statistics import StageStatistics
from fdg_keras.transforms import GradientShrinking


def plan_record(plan: Plan) -> list[dict[str, Any]]:
    """Returns a plan's stages: what its table shows, and the layers."""
    total = sum(stage.operations for stage in plan.stages) or 1.0
    return [
        {
            "stage": k,
            "device": stage.device.removeprefix(HERE),
            "from": stage.layers[0],
            "to": stage.layers[-1],
            "layers": list(stage.layers),
            "parameters": stage.parameters,
            "work": stage.operations / total,
            "sends": stage.sends,
        }
        for k, stage in enumerate(plan.stages)
    ]


def shares(one: StageStatistics) -> dict[str, float]:
    """Returns what parts of its time a stage spent on what, 1 in all."""
    usage = one.usage
    total = usage.total or 1.0
    return {
        "computing": usage.computed / total,
        "waiting_for_activations": usage.waited_activations / total,
        "waiting_for_gradients": usage.waited_gradients / total,
        "idle": usage.idle / total,
    }


def quantities(one: StageStatistics) -> dict[str, float | None]:
    """Returns what there is to plot of a stage; `None` was not measured.

    Links as parts of what they hold, memory in MiB, all else in the units of
    `StageStatistics`.
    """

    def part(waiting: float | None) -> float | None:
        return None if waiting is None else waiting / one.capacity

    memory = one.memory_bytes
    return {
        **shares(one),
        "ms_per_tick": one.ms_per_tick,
        # What waits for the first stage are data, fed in parts of many batches.
        "activations_link": part(
            one.activations_waiting if one.stage else None
        ),
        "gradients_link": part(one.gradients_waiting),
        "staleness": one.staleness,
        "drift": one.drift,
        "gradient_norm": one.gradient_norm,
        "transformed_norm": one.transformed_norm,
        "learning_rate": one.learning_rate,
        "memory_mib": None if memory is None else memory / 2**20,
    }


def stage_record(one: StageStatistics) -> dict[str, Any]:
    """Returns the statistics of a stage, without its passes."""
    record = dataclasses.asdict(dataclasses.replace(one, passes=()))
    del record["passes"]
    return {**record, **quantities(one)}


def settings_record(
    model: keras.Model, settings: Settings, params: dict
) -> dict[str, Any]:
    """Returns what is known of how a model is trained.

    Args:
        model: The model.
        settings: Those of its stages.
        params: Those of its callbacks.
    """
    optimizer, shrink = model.optimizer, settings.transform
    return {
        "model": model.name,
        "parameters": model.count_params(),
        "delay": settings.delay,
        "shrink": (
            shrink.beta
            if isinstance(shrink, GradientShrinking)
            else repr(shrink)
        ),
        "stash": settings.stash,
        "order": settings.order,
        "corrections": [repr(one) for one in settings.corrections],
        "optimizer": type(optimizer).__name__,
        **optimizer.get_config(),
        "epochs": params.get("epochs"),
        "steps_per_epoch": params.get("steps"),
        "steps_per_execution": model.steps_per_execution,
    }


def versions() -> dict[str, str]:
    """Returns the versions of what a run depends on."""
    found = {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }
    # A checkout may be used without being installed.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["fdg_keras"] = importlib.metadata.version("fdg_keras")
    return found


def write(path: pathlib.Path, data: bytes) -> None:
    """Writes a file: the old one or the new one is there, never a part."""
    # Beside its place: a move from elsewhere would be a copy.
    new = path.with_name(f"unfinished-{path.name}")
    new.write_bytes(data)
    os.replace(new, path)


def to_json(value: Any) -> bytes:
    """Returns JSON. Numbers that are not finite become null."""
    return json.dumps(_plain(value), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
