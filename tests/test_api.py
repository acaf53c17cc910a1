"""The public names and signatures, exactly."""

import ast
import inspect
import pathlib
import subprocess
import sys

import keras
import pytest

import fdg_keras

ROOT = pathlib.Path(__file__).parents[1]

SETTINGS = {
    "splits": 2,
    "devices": None,
    "delay": 2,
    "shrink": 1.0,
    "stash": "exact",
    "order": "forward_first",
    "corrections": (),
    "emulate": False,
}


def defaults(function):
    """The arguments of a function, in order, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }


def test_public_names():
    assert sorted(fdg_keras.__all__) == [
        "Correction",
        "DelayCompensation",
        "GradientShrinking",
        "GradientTransformer",
        "LearningRateRescheduling",
        "Plan",
        "StagePlan",
        "Trainer",
        "WeightPrediction",
        "connect_to_cluster",
        "fit",
        "plan",
    ]
    assert all(hasattr(fdg_keras, name) for name in fdg_keras.__all__)


def test_nothing_else_looks_public():
    names = {
        name
        for name, value in vars(fdg_keras).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert names == set(fdg_keras.__all__)


def test_trainer():
    assert defaults(fdg_keras.Trainer) == {
        "model": inspect.Parameter.empty,
        **SETTINGS,
    }
    public = {name for name in vars(fdg_keras.Trainer) if name[0] != "_"}
    assert public == {"fit", "evaluate", "plan", "predict", "statistics"}


def test_fit():
    parameters = inspect.signature(fdg_keras.fit).parameters
    assert list(parameters) == ["model", "args", *SETTINGS, "kwargs"]
    assert {name: parameters[name].default for name in SETTINGS} == SETTINGS
    # So that whatever follows the model is what `keras.Model.fit` takes.
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    assert all(parameters[name].kind == keyword_only for name in SETTINGS)


@pytest.mark.parametrize("method", ["fit", "predict"])
def test_methods_take_what_those_of_keras_take(method):
    found = defaults(getattr(fdg_keras.Trainer, method))
    wanted = defaults(getattr(keras.Model, method))
    assert list(found.items()) == list(wanted.items())


def test_evaluate_takes_what_that_of_keras_takes():
    wanted = defaults(keras.Model.evaluate)
    del wanted["kwargs"]  # private
    found = defaults(fdg_keras.Trainer.evaluate)
    assert list(found.items()) == list(wanted.items())


def test_shrinking():
    assert defaults(fdg_keras.GradientShrinking) == {
        "beta": inspect.Parameter.empty
    }


def test_connect_to_cluster():
    assert defaults(fdg_keras.connect_to_cluster) == {
        "cluster": None,
        "timeout_s": 20.0,
    }


def test_plan():
    assert list(defaults(fdg_keras.Plan)) == [
        "stages",
        "batch_size",
        "delay",
        "stash",
        "step_s",
        "whole_s",
        "measured_step_s",
        "measured_on",
        "notes",
        "advice",
    ]
    assert list(defaults(fdg_keras.StagePlan)) == [
        "device",
        "layers",
        "parameters",
        "operations",
        "sends",
        "costs",
        "counts",
        "forward_s",
        "backward_s",
        "again_s",
        "sends_s",
        "returns_s",
        "sends_bytes",
        "stash_bytes",
        "peak_bytes",
        "bytes",
        "measured_s",
    ]
    assert defaults(fdg_keras.plan) == {
        "model": inspect.Parameter.empty,
        "splits": 4,
        "batch_size": 128,
        "devices": None,
        "delay": 2,
        "stash": "exact",
        "measure": True,
        "memory_limit": None,
        "cache_dir": None,
    }


@pytest.mark.parametrize("name", fdg_keras.__all__)
def test_what_is_public_is_documented(name):
    thing = getattr(fdg_keras, name)
    assert len(inspect.getdoc(thing).splitlines()) > 2


@pytest.mark.parametrize(
    "name",
    ["Trainer", "connect_to_cluster", "fit", "plan", "GradientShrinking"],
)
def test_every_argument_is_documented(name):
    thing = getattr(fdg_keras, name)
    text = inspect.getdoc(thing)
    for argument in defaults(thing):
        stars = {"args": "*", "kwargs": "**"}.get(argument, "")
        assert f"\n    {stars}{argument}: " in text


def test_everything_is_typed():
    """`py.typed` promises it; the type checker reads the rest."""
    assert (ROOT / "fdg_keras" / "py.typed").exists()
    for name in ("Trainer", "fit", "GradientShrinking"):
        function = getattr(fdg_keras, name)
        annotations = inspect.signature(function).parameters.values()
        empty = inspect.Parameter.empty
        assert all(p.annotation is not empty for p in annotations)


def test_the_version_is_that_of_the_package():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (version,) = (
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "version"
    )
    assert fdg_keras.__version__ == version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {version} " in changes


@pytest.fixture(scope="module")
def fresh_interpreter():
    """What an interpreter says that imports the library twice."""
    code = """
import keras
backend = keras.backend.backend
keras.backend.backend = lambda: "jax"
try:
    import fdg_keras
except ImportError as error:
    print(error)
keras.backend.backend = backend
import fdg_keras
import threading
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
print(len(tf.config.list_logical_devices("CPU")))
print([thread.name for thread in threading.enumerate()])
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_another_backend_is_refused(fresh_interpreter):
    assert "KERAS_BACKEND=tensorflow" in fresh_interpreter[0]
    assert "Received: backend 'jax'" in fresh_interpreter[0]


def test_importing_starts_nothing(fresh_interpreter):
    """No device is touched, so the user may still configure them."""
    count, threads = fresh_interpreter[1:]
    assert count == "2"
    assert "fdg" not in threads
