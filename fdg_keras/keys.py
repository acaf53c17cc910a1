"""Which nodes compute the same, and so take as long.

They have the same operation with the same settings, inputs and weights of the
same shapes, and the same device. Names and seeds aside: these make layers
different that are not.
"""

import dataclasses
import functools
import hashlib
import numbers
import os
import pathlib
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.slicing import Node

# Where a layer keeps what leads to all other layers of its model.
_NEIGHBOURS = ("_inbound_nodes", "_outbound_nodes")

# What differs between layers that compute the same: settings, attributes.
_OWN = ("name", "seed", "shared_object_id", "build_config")
_OWN_ATTRIBUTES = ("name", "_name", "_path", "_parent_path", "seed")


def key_of(
    node: Node, specs: Sequence[tf.TensorSpec], wanted: bool, setting: tuple
) -> tuple[str, bool]:
    """Returns a name that nodes share if they compute the same.

    Args:
        node: One of a model's.
        specs: Of the model's values, in the batch that is meant.
        wanted: Whether gradients of its inputs are.
        setting: What else it depends on.

    Returns:
        The name, and whether it will be good tomorrow: it is if all code is
        Keras' own. Of other code it is known whether it is the same only as
        long as the graph exists.
    """
    numbers = {v: i for i, v in enumerate(dict.fromkeys(node.inputs))}
    operation = node.operation
    foreign = list(_foreign(node))
    text = repr(
        (
            type(operation).__module__,
            type(operation).__qualname__,
            _configuration(node),
            [
                (numbers[v], specs[v].shape.as_list(), specs[v].dtype)
                for v in node.inputs
            ],
            [(v.shape, v.dtype, v.trainable) for v in node.variables],
            wanted,
            setting,
            list(map(id, foreign)),
            _attributes(node) if foreign else None,
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32], not foreign


def where(device: str) -> tuple:
    """Returns what a duration depends on beside layers and batch.

    Args:
        device: Full TensorFlow name.
    """
    spec = tf.DeviceSpec.from_string(device)
    here = spec.job == "localhost"
    return (
        *(_local(spec) if here else _remote(spec)),
        None if here else (spec.job, spec.task),
        tf.config.threading.get_intra_op_parallelism_threads(),
        tf.__version__,
        keras.__version__,
        _own_version(),
    )


def _local(spec: tf.DeviceSpec) -> tuple[str, str, int]:
    """Returns the kind of a device, the processor beside it, and its cores."""
    kind = spec.device_type
    if kind == "GPU":
        gpus = tf.config.list_physical_devices("GPU")
        index = min(spec.device_index or 0, len(gpus) - 1)
        kind = repr(tf.config.experimental.get_device_details(gpus[index]))
    return kind, _processor(), len(os.sched_getaffinity(0))


def _remote(spec: tf.DeviceSpec) -> tuple[str, str, int]:
    """Returns the same of another machine, as its own files tell it.

    What tasks of a name are may differ from one cluster to the next.
    """
    cpu = spec.replace(device_type="CPU", device_index=0).to_string()
    lines = _lines("/proc/cpuinfo", cpu)
    named = (line for line in lines if line.startswith("model name"))
    kind = spec.device_type
    if kind == "GPU":
        found = _lines("/proc/driver/nvidia/gpus/*/information", cpu)
        kind = repr([line for line in found if line.startswith("Model:")])
    cores = sum(line.startswith("processor") for line in lines)
    return kind, next(named, ""), cores


def _lines(pattern: str, device: str) -> list[str]:
    """Returns those of files on a device's machine; none if they cannot be."""
    try:
        return _text(pattern, device).splitlines()
    except tf.errors.OpError:
        return []


@functools.cache
def _text(pattern: str, device: str) -> str:
    with tf.device(device):
        paths = sorted(tf.io.matching_files(pattern).numpy())
        texts = [tf.io.read_file(path).numpy() for path in paths]
    return b"\n".join(texts).decode(errors="replace")


@functools.cache
def _processor() -> str:
    """Returns the model of the processor, as far as it is known."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


@functools.cache
def _own_version() -> str:
    try:
        return metadata.version("fdg_keras")
    except metadata.PackageNotFoundError:  # run from its source
        return ""


def _parts(node: Node) -> list[Any]:
    """Returns the operation of a node, and all layers in it."""
    if isinstance(node.operation, keras.layers.Layer):
        return _keras.layers_within(node.operation)
    return [node.operation]


def _attributes(node: Node) -> list[list[tuple[str, str]]]:
    """Returns what the parts of a node have for numbers, texts and the like.

    A configuration that the user wrote need not tell all settings.
    """
    left_out = (*_NEIGHBOURS, *_OWN_ATTRIBUTES)
    return [
        sorted(
            (name, _repr(value))
            for name, value in vars(part).items()
            if name not in left_out and _is_plain(value)
        )
        for part in _parts(node)
    ]


def _is_plain(value: Any) -> bool:
    """Whether a value is data, and made of nothing but data."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return _is_plain([*value.keys(), *value.values()])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _is_plain(_fields(value))
    plain = (numbers.Number, str, bytes, range, np.ndarray, np.generic)
    return isinstance(value, plain)


def _repr(value: Any) -> str:
    """Returns a text that differs for plain values that differ."""
    if isinstance(value, np.ndarray):  # of which `repr` shows a part
        return repr((value.shape, value.dtype, value.tobytes()))
    if isinstance(value, dict):
        return repr([(_repr(k), _repr(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return repr(list(map(_repr, value)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _repr(_fields(value))
    return repr(value)


def _fields(value: Any) -> list[Any]:
    return [getattr(value, one.name) for one in dataclasses.fields(value)]


def _foreign(node: Node) -> Iterator[Any]:
    """Yields the classes and functions of a node that are not Keras' own."""
    found = [*node.call.arguments.args, *node.call.arguments.kwargs.values()]
    for part in _parts(node):
        found.append(type(part))
        found += [v for k, v in vars(part).items() if k not in _NEIGHBOURS]
    seen = set()
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            found += value
        elif _is_foreign(value):
            yield value if callable(value) else type(value)


def _is_foreign(value: Any) -> bool:
    module = getattr(value, "__module__", None) or type(value).__module__
    root = module.partition(".")[0]
    if root == "keras":
        return False
    # Data have no code; what is a number for Python is one for all.
    return callable(value) or root not in ("builtins", "numpy", *_KNOWN)


# Whose objects layers hold without calling them.
_KNOWN = ("tensorflow", "inspect", "collections", "weakref", "threading")


def _configuration(node: Node) -> Any:
    """Returns the settings of an operation and of its call."""
    arguments = _keras.tree.map_structure(
        lambda x: None if isinstance(x, keras.KerasTensor) else repr(x),
        (node.call.arguments.args, node.call.arguments.kwargs),
    )
    try:
        config = node.operation.get_config()
    except Exception:
        # Keras asks for a `get_config` of the user's, which may do anything.
        return node.name, arguments
    return _settings(config), arguments


def _settings(config: Any, keeps_name: bool = False) -> Any:
    """Returns a configuration without what makes layers only look different."""
    if isinstance(config, dict):
        # The name of a policy says what it is.
        is_policy = "DTypePolicy" in str(config.get("class_name"))
        return {
            key: _settings(value, is_policy)
            for key, value in config.items()
            if key not in _OWN or (key == "name" and keeps_name)
        }
    if isinstance(config, (list, tuple)):
        return [_settings(value) for value in config]
    return config
