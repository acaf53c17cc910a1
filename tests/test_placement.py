"""Device names, and variables that live elsewhere for a while."""

import os
import signal
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CPU_COUNT
from keras import layers

import fdg_keras
from fdg_keras import _keras
from fdg_keras.placement import (
    Relocation,
    host_of,
    is_here,
    resolve_devices,
)

FULL = "/job:localhost/replica:0/task:0/device:CPU:{}"


# -- Names --------------------------------------------------------------------


def test_all_devices_by_default(cpus):
    names = [FULL.format(i) for i in range(CPU_COUNT)]
    assert len(cpus) == CPU_COUNT
    assert resolve_devices(None, CPU_COUNT) == names
    assert resolve_devices(None, 2) == names[:2]


@pytest.mark.parametrize(
    "name",
    ["CPU:2", "/CPU:2", "/device:CPU:2", "cpu:2", "/cpu:2", FULL.format(2)],
)
def test_names_as_tf_device_takes_them(name):
    with tf.device(name):
        assert tf.constant(0).device == FULL.format(2)
    assert resolve_devices([name], 1) == [FULL.format(2)]


def test_the_order_is_that_of_the_list():
    assert resolve_devices(["CPU:3", "CPU:1"], 2) == [
        FULL.format(3),
        FULL.format(1),
    ]


def test_the_first_of_a_kind():
    assert resolve_devices(["CPU"], 1) == [FULL.format(0)]


def test_more_devices_than_stages_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resolve_devices(["CPU:0", "CPU:1", "CPU:2"], 2)
    assert found == [FULL.format(0), FULL.format(1)]


def test_fewer_devices_are_dealt_round_robin_with_a_warning():
    message = r"5 stages share 2 device\(s\): CPU:4, CPU:5, dealt round robin"
    with pytest.warns(UserWarning, match=message):
        found = resolve_devices(["CPU:4", "CPU:5"], 5)
    assert found == [FULL.format(i) for i in (4, 5, 4, 5, 4)]


def test_the_same_device_twice_is_taken_at_its_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_devices(["CPU:1", "CPU:1"], 2) == [FULL.format(1)] * 2


@pytest.mark.parametrize(
    "device",
    [
        "CPU:99",
        "GPU:0",
        "TPU:0",
        "nonsense",
        "",
        "/job:worker/task:1/device:CPU:0",
        3,
        None,
        "/job:localhost",
    ],
)
def test_unknown_devices(device):
    message = r"Unknown device\. Expected one of \['CPU:0', .*Received: "
    with pytest.raises(ValueError, match=message):
        resolve_devices(["CPU:0", device], 2)


@pytest.mark.parametrize("devices", ["CPU:0", [], ()])
def test_what_is_no_list_of_devices(devices):
    message = r"Expected `devices` to be a list.*\['GPU:0', 'GPU:1'\].*Received"
    with pytest.raises(ValueError, match=message):
        resolve_devices(devices, 1)


@pytest.mark.parametrize(
    ("device", "host"),
    [
        (FULL.format(3), FULL.format(3)),
        ("/job:localhost/replica:0/task:0/device:GPU:2", FULL.format(0)),
        (
            "/job:worker/replica:0/task:1/device:GPU:2",
            "/job:worker/replica:0/task:1/device:CPU:0",
        ),
    ],
)
def test_the_host_of_a_device(device, host):
    assert host_of(device) == host


# -- Relocation ---------------------------------------------------------------


def test_what_is_here():
    assert is_here(resolve_devices(["CPU:1"], 1)[0])
    assert not is_here("/job:worker/replica:0/task:0/device:CPU:0")


@pytest.fixture
def variable():
    return keras.Variable([1.0, 2.0], name="v")


def device_of(variable):
    return variable.value.device


def test_there_and_back(variable):
    relocation = Relocation()
    relocation.move(variable, FULL.format(3))
    home = device_of(variable)
    assert home == FULL.format(0)
    with relocation:
        assert device_of(variable) == FULL.format(3)
        np.testing.assert_array_equal(variable, [1.0, 2.0])
        variable.assign([3.0, 4.0])
    assert device_of(variable) == home
    np.testing.assert_array_equal(variable, [3.0, 4.0])


def test_what_was_assigned_at_home_goes_along(variable):
    relocation = Relocation()
    relocation.move(variable, FULL.format(3))
    with relocation:
        pass
    variable.assign([5.0, 6.0])
    with relocation:
        np.testing.assert_array_equal(variable, [5.0, 6.0])


def test_the_same_storage_comes_back(variable):
    storage = _keras.get_storage(variable)
    relocation = Relocation()
    relocation.move(variable, FULL.format(3))
    with relocation:
        away = _keras.get_storage(variable)
        assert away is not storage
    assert _keras.get_storage(variable) is storage
    with relocation:
        assert _keras.get_storage(variable) is away


def test_a_variable_that_is_there_already_stays(variable):
    storage = _keras.get_storage(variable)
    relocation = Relocation()
    relocation.move(variable, device_of(variable))
    with relocation:
        assert _keras.get_storage(variable) is storage


def test_a_variable_is_moved_once(variable):
    relocation = Relocation()
    relocation.move(variable, FULL.format(3))
    relocation.move(variable, FULL.format(4))
    with relocation:
        assert device_of(variable) == FULL.format(3)


def test_an_integer_variable_moves_too():
    seed = keras.random.SeedGenerator(7).state
    before = seed.numpy()
    relocation = Relocation()
    relocation.move(seed, FULL.format(2))
    with relocation:
        assert device_of(seed) == FULL.format(2)
        assert seed.numpy().dtype == before.dtype
        np.testing.assert_array_equal(seed, before)


def test_contexts_nest(variable):
    relocation = Relocation()
    relocation.move(variable, FULL.format(3))
    with relocation:
        with relocation:
            variable.assign([7.0, 8.0])
        assert device_of(variable) == FULL.format(3)
        np.testing.assert_array_equal(variable, [7.0, 8.0])
    assert device_of(variable) == FULL.format(0)


def test_a_move_within_the_context_takes_effect_at_once(variable):
    relocation = Relocation()
    with relocation:
        relocation.move(variable, FULL.format(3))
        assert device_of(variable) == FULL.format(3)
    assert device_of(variable) == FULL.format(0)


def test_they_come_back_after_an_error(variable):
    relocation = Relocation()
    relocation.move(variable, FULL.format(3))

    def fails():
        with relocation:
            variable.assign([9.0, 9.0])
            raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        fails()
    assert device_of(variable) == FULL.format(0)
    np.testing.assert_array_equal(variable, [9.0, 9.0])


def test_home_for_a_moment(variable):
    relocation = Relocation()
    relocation.move(variable, FULL.format(3))
    other = keras.Variable(0.0)
    with relocation:
        variable.assign([3.0, 4.0])
        with relocation.at_home():
            assert device_of(variable) == FULL.format(0)
            np.testing.assert_array_equal(variable, [3.0, 4.0])
            relocation.move(other, FULL.format(3))
            assert device_of(other) == FULL.format(0)
        assert device_of(variable) == device_of(other) == FULL.format(3)
    with relocation.at_home():
        assert device_of(variable) == FULL.format(0)
    assert device_of(variable) == FULL.format(0)


def test_what_was_saved_is_left_when_a_device_is_lost(variable):
    """Of all variables what was saved, whatever they are by then."""
    other = keras.Variable([3.0, 3.0], trainable=False)
    moved = Relocation(may_be_lost=True)
    moved.move(variable, FULL.format(2))
    moved.move(other, FULL.format(3))
    moved.__enter__()
    for one in (variable, other):
        one.assign([7.0, 7.0])
    moved.save()
    for one in (variable, other):
        one.assign([8.0, 8.0])
    moved.abandon()
    assert not moved.is_away
    for one in (variable, other):
        assert device_of(one) == FULL.format(0)
        np.testing.assert_array_equal(one, [7.0, 7.0])


def test_what_lives_on_its_device_is_saved_too(variable):
    moved = Relocation(may_be_lost=True)
    moved.move(variable, device_of(variable))
    before = np.array(variable)
    moved.__enter__()
    variable.assign([8.0, 8.0])
    moved.abandon()
    np.testing.assert_array_equal(variable, before)
    with moved:
        variable.assign([9.0, 9.0])
    np.testing.assert_array_equal(variable, [9.0, 9.0])


def test_values_come_home_where_a_device_may_be_lost(variable):
    moved = Relocation(may_be_lost=True)
    moved.move(variable, FULL.format(2))
    with moved, moved:
        variable.assign([5.0, 6.0])
        with moved.at_home():
            np.testing.assert_array_equal(variable, [5.0, 6.0])
            assert device_of(variable) == FULL.format(0)
        assert device_of(variable) == FULL.format(2)
        variable.assign([6.0, 7.0])
    np.testing.assert_array_equal(variable, [6.0, 7.0])


@pytest.mark.parametrize("may_be_lost", [False, True])
def test_two_variables_share_the_place_of_one(variable, may_be_lost):
    with tf.device(FULL.format(0 if may_be_lost else 2)):
        other = keras.Variable([0.0, 0.0])
    relocation = Relocation(may_be_lost)
    relocation.share(variable, other)
    with relocation:
        np.testing.assert_array_equal(other, [1.0, 2.0])
        other.assign([5.0, 6.0])
        np.testing.assert_array_equal(variable, [5.0, 6.0])
    np.testing.assert_array_equal(variable, [5.0, 6.0])
    variable.assign([0.0, 1.0])
    np.testing.assert_array_equal(other, [5.0, 6.0])


def test_what_is_shared_at_home_is_there_once(variable):
    other = keras.Variable([0.0, 0.0])
    relocation = Relocation()
    relocation.share(variable, other)
    variable.assign([3.0, 4.0])
    np.testing.assert_array_equal(other, [3.0, 4.0])
    with relocation:
        other.assign([5.0, 6.0])
    np.testing.assert_array_equal(variable, [5.0, 6.0])


def test_functions_compiled_before_go_on_working():
    """They hold the storage at home, so that is where the values must be."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, name="d")])
    x = np.ones((1, 2), "float32")
    model.predict(x, verbose=0)  # compiles
    relocation = Relocation()
    for v in model.variables:
        relocation.move(v, FULL.format(3))
    with relocation:
        model.get_layer("d").kernel.assign([[2.0], [3.0]])
        inside = model(x)
        assert inside.device == FULL.format(0)
    np.testing.assert_allclose(model.predict(x, verbose=0), [[5.0]])
    np.testing.assert_allclose(inside, [[5.0]])


def test_an_interrupt_finds_all_variables_in_one_place(monkeypatch):
    """It came between two of them, and the model was of no more use."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    trainer = fdg_keras.Trainer(model, 1, ["CPU:1"])
    x = np.ones((4, 2))
    trainer.fit(x, x, verbose=0)
    set_storage = _keras.set_storage
    calls, at = [], set()

    def interrupted(variable, storage):
        set_storage(variable, storage)
        calls.append(variable)
        if len(calls) in at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(_keras, "set_storage", interrupted)
    for when in ({1}, {2}, {1, 2, 3}):
        calls.clear()
        at |= when
        with pytest.raises(KeyboardInterrupt, match=r"^$|Interrupted"):
            trainer.fit(x, x, verbose=0)
        devices = {v.value.device[-5:] for v in model.variables}
        assert devices == {"CPU:0"}
    at.clear()
    trainer.fit(x, x, verbose=0)
    model.fit(x, x, verbose=0)
