"""Fake devices and per-test hygiene, shared by all tests."""

import os

# Before TensorFlow is imported: it reads these once.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import sys
import threading
from collections.abc import Iterator

import hypothesis
import keras
import pytest
import tensorflow as tf

#: Logical CPUs that stand in for accelerators.
CPU_COUNT = 8

#: Every thread that the library starts has a name that begins like this.
THREAD_PREFIX = "fdg"

# The default draws the same examples in every run, so that a verdict can be
# repeated; `pytest --hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("explore", deadline=None)
# For `scripts/fuzz.sh`, with the number of examples from there.
hypothesis.settings.register_profile(
    "fuzz",
    deadline=None,
    print_blob=True,
    max_examples=int(os.environ.get("FDG_FUZZ_EXAMPLES") or 2000),
    # The first model may take longer to make than all that follow.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


# The thread that tunes a data set may miss that its iterator is deleted, and be
# waited for up to a minute in which Python stands still: it looks whether it is
# cancelled while the cancellation is under way, and goes to sleep again. Of a
# suite with thousands of iterators on busy cores it was a quarter of the time.
# The library has data sets untuned anyway; this is for those of `model.fit`.
_UNTUNED = tf.data.Options()
_UNTUNED.autotune.enabled = False
_iterate = tf.data.Dataset.__iter__
tf.data.Dataset.__iter__ = lambda self: _iterate(self.with_options(_UNTUNED))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu",
        action="store_true",
        help="leave GPUs visible and run the tests marked 'gpu'",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the logical devices, once: TensorFlow cannot change them later."""
    if not config.getoption("--gpu"):
        # Otherwise the default devices, and with them the tolerances, would
        # depend on the machine.
        tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * CPU_COUNT,
    )
    # TensorFlow's first messages were captured while this file was imported.
    # Said now: pytest would say them after its own closing line.
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None and capture.is_globally_capturing():
        sys.stderr.write("".join(capture.read_global_capture()))


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("--gpu") and tf.config.list_physical_devices("GPU"):
        return
    skip = pytest.mark.skip(reason="needs --gpu and a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_keras() -> Iterator[None]:
    """Same seed, names and dtype policy for each test, whatever ran before."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def _library_threads() -> set[threading.Thread]:
    return {
        thread
        for thread in threading.enumerate()
        if thread.name.startswith(THREAD_PREFIX)
    }


@pytest.fixture(autouse=True)
def no_thread_outlives_a_test() -> Iterator[None]:
    """Fails a test that leaves a thread of the library behind."""
    before = _library_threads()
    yield
    left = _library_threads() - before
    assert not left, f"threads outlived the test: {sorted(map(str, left))}"


@pytest.fixture(scope="session")
def cpus() -> list[str]:
    """The names of the logical CPUs, as `tf.device` takes them."""
    return [device.name for device in tf.config.list_logical_devices("CPU")]
