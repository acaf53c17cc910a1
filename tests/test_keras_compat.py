"""Every private Keras name the library uses still is what it was.

One test for each function of `fdg_keras/_keras.py`. When a new release of
Keras changes something, it is these that fail, by name.
"""

import inspect
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from fdg_keras import _keras


def floats(*shape):
    return np.random.RandomState(0).standard_normal(shape).astype("float32")


@pytest.fixture
def model():
    """Two dense layers, `one` and `two`; not compiled."""
    inputs = keras.Input((4,), name="in")
    h = layers.Dense(3, name="one")(inputs)
    return keras.Model(inputs, layers.Dense(2, name="two")(h))


def test_every_function_has_a_test():
    source = pathlib.Path(__file__).read_text(encoding="utf-8")
    functions = [
        name
        for name, value in vars(_keras).items()
        if inspect.isfunction(value) and value.__module__ == _keras.__name__
    ]
    assert "functional_of" in functions
    assert [f for f in functions if f"_keras.{f}(" not in source] == []


# -- Graphs -------------------------------------------------------------------


def test_functional_of_functional(model):
    assert _keras.functional_of(model) is model


def test_functional_of_sequential():
    sequential = keras.Sequential([layers.Dense(3)])
    assert _keras.functional_of(sequential) is None  # not built
    sequential.build((None, 4))
    functional = _keras.functional_of(sequential)
    assert isinstance(functional, _keras.Functional)
    assert [tuple(t.shape) for t in functional.inputs] == [(None, 4)]


def test_functional_of_what_has_a_call_of_its_own():
    class OwnFunctional(keras.Model):
        def call(self, inputs):
            return inputs

    class OwnSequential(keras.Sequential):
        def call(self, inputs):
            return inputs

    inputs = keras.Input((4,))
    functional = OwnFunctional(inputs, layers.Dense(3)(inputs))
    assert isinstance(functional, _keras.Functional)
    assert _keras.functional_of(functional) is None
    assert _keras.functional_of(OwnSequential([inputs])) is None
    assert _keras.functional_of(layers.Dense(3)) is None


def test_calls_in_order(model):
    calls = _keras.calls_in_order(model)
    assert [call.operation.name for call in calls] == ["one", "two"]
    assert calls[0].input_tensors == model.inputs
    assert calls[0].outputs == calls[1].input_tensors
    assert calls[1].outputs == model.outputs
    assert calls[0].arguments.args == tuple(model.inputs)
    assert all(not call.is_input for call in calls)


def test_calls_in_order_is_the_order_in_which_keras_runs_them():
    ran = []

    class Says(layers.Layer):
        def call(self, *inputs):
            ran.append(self.name)
            return inputs[0] * 1.0

    a, b = keras.Input((2,)), keras.Input((2,))
    left = Says(name="left")(a)
    right = Says(name="right_2")(Says(name="right_1")(b))
    model = keras.Model([a, b], Says(name="join")(left, right))
    ran.clear()
    model([floats(1, 2), floats(1, 2)])
    assert ran[-1] == "join"
    found = [c.operation.name for c in _keras.calls_in_order(model)]
    assert [name for name in found if name in ran] == ran


def test_fill_in():
    a, b = keras.Input((2,)), keras.Input((2,))
    summed = layers.Add()([a, b])
    (call,) = _keras.calls_in_order(keras.Model([a, b], summed))
    filled = _keras.fill_in(call, {id(a): "x", id(b): "y"})
    assert filled == ((["x", "y"],), {})


def test_run_operation_injects_training():
    dropout = layers.Dropout(0.5, seed=1)
    x = np.ones((1, 100), "float32")
    for training, dropped in ((True, True), (False, False)):
        for recorded in ({}, {"training": not training}):
            y = _keras.run_operation(dropout, (x,), dict(recorded), training)
            assert bool(np.any(np.array(y) == 0)) is dropped


def test_run_operation_runs_what_takes_no_training(model):
    x = floats(2, 4)
    one = model.get_layer("one")
    found = _keras.run_operation(one, (x,), {}, True)
    np.testing.assert_array_equal(found, one(x))


def test_one_call():
    """Both losses of a layer that is called twice, until the next call."""
    holder = keras.layers.Layer()
    holder.inner = keras.layers.Dense(2, activity_regularizer="l2")
    x = keras.ops.ones((1, 2))
    for _ in range(2):
        with _keras.one_call(holder, training=True):
            holder.inner(holder.inner(x))
        assert len(holder.losses) == 2
    holder.inner(x)
    assert len(holder.losses) == 1


@pytest.mark.parametrize("training", [True, False])
def test_one_call_says_whether_it_trains(training):
    class Asks(keras.layers.Layer):
        def call(self, x, training=None):
            self.asked = training
            return x

    holder = keras.layers.Layer()
    holder.inner = Asks()
    with _keras.one_call(holder, training):
        holder.inner(keras.ops.ones((1, 2)))
    assert holder.inner.asked is training


def test_standardize_inputs():
    b = keras.Input((1,), name="b", dtype="int32")
    a = keras.Input((2,), name="a")
    joined = layers.Concatenate()([a, keras.ops.cast(b, "float32")])
    model = keras.Model({"b": b, "a": a}, joined)
    x = {"a": np.ones((3, 2), "float64"), "b": np.full((3,), 7.0)}
    found = _keras.standardize_inputs(model, x)
    for tensor, symbol in zip(found, model.inputs, strict=True):
        assert tensor.dtype.name == symbol.dtype
        assert tensor.shape[1:] == symbol.shape[1:]
    assert sorted(float(t[0, 0]) for t in found) == [1.0, 7.0]


def test_masks():
    tensor = tf.ones((2, 3))
    assert _keras.get_mask(tensor) is None
    mask = tf.constant([[True, True, False]] * 2)
    _keras.set_mask(tensor, mask)
    assert _keras.get_mask(tensor) is mask


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits(activation):
    """Keras' crossentropies are computed from them, if they are known."""
    logits = tf.constant([[200.0, -200.0]])
    probabilities = keras.activations.get(activation)(logits)
    assert _keras.get_logits(probabilities) == (logits, "Keras")
    loss = keras.losses.CategoricalCrossentropy()
    wanted = tf.constant([[0.0, 1.0]])
    assert float(loss(wanted, probabilities)) == pytest.approx(400)
    bare = tf.constant(probabilities.numpy())
    assert _keras.get_logits(bare) == (None, "Keras")
    assert float(loss(wanted, bare)) < 20
    assert _keras.with_logits(bare, logits, "Keras") is bare
    assert float(loss(wanted, bare)) == pytest.approx(400)


def test_logits_of_tensorflows_own_softmax():
    """Keras finds them in a graph, and there alone."""
    logits = tf.constant([[200.0, -200.0]])
    assert _keras.get_logits(tf.nn.softmax(logits)) == (None, "Keras")
    loss = keras.losses.CategoricalCrossentropy()
    wanted = tf.constant([[0.0, 1.0]])

    @tf.function
    def compute(logits):
        made = tf.nn.softmax(logits)
        found, by = _keras.get_logits(made)
        assert found is logits
        assert by == "Softmax"
        again = _keras.with_logits(tf.identity(made), logits, by)
        gate, by = _keras.get_logits(tf.nn.sigmoid(logits))
        assert gate is logits
        assert by == "Sigmoid"
        assert _keras.get_logits(tf.identity(made)) == (None, "Keras")
        return loss(wanted, again)

    assert float(compute(logits)) == pytest.approx(400)


def test_the_masks_of_layers():
    ids = tf.constant([[3, 1, 0]])
    embedded = layers.Embedding(5, 2, mask_zero=True)(ids)
    mask = _keras.get_mask(embedded)
    np.testing.assert_array_equal(mask, [[True, True, False]])
    # A layer heeds a mask that was set.
    pooled = layers.GlobalAveragePooling1D()
    bare = tf.constant(embedded.numpy())
    _keras.set_mask(bare, mask)
    np.testing.assert_allclose(pooled(bare), pooled(embedded))
    assert not np.allclose(pooled(bare), pooled(embedded.numpy()))


# -- Variables ----------------------------------------------------------------


def test_storage():
    variable = keras.Variable([1.0, 2.0])
    storage = _keras.get_storage(variable)
    assert isinstance(storage, tf.Variable)
    assert storage is variable.value
    other = tf.Variable([3.0, 4.0])
    _keras.set_storage(variable, other)
    assert variable.value is other
    variable.assign([5.0, 6.0])
    np.testing.assert_array_equal(other, [5.0, 6.0])
    np.testing.assert_array_equal(storage, [1.0, 2.0])
    assert _keras.stood_for(storage) is variable
    assert _keras.stood_for(other) is variable
    assert _keras.stood_for(tf.Variable(1.0)) is None


def test_where_data_are():
    with tf.device("CPU:1"):
        data = tf.data.Dataset.range(3)
        iterator = iter(data)
    for one in (data, iterator):
        assert _keras.device_of(one).endswith("device:CPU:1")
    assert _keras.device_of(np.zeros(3)) is None


def test_layers_compute_with_the_storage_they_have_now(model):
    one = model.get_layer("one")
    x = floats(2, 4)
    before = np.array(one(x))
    storage = _keras.get_storage(one.kernel)
    _keras.set_storage(one.kernel, tf.Variable(tf.zeros_like(storage)))
    np.testing.assert_array_equal(one(x), np.zeros((2, 3)))
    _keras.set_storage(one.kernel, storage)
    np.testing.assert_array_equal(one(x), before)


# -- Optimizers ---------------------------------------------------------------


def test_learning_rate_of():
    sgd = keras.optimizers.SGD(0.25)
    found = _keras.learning_rate_of(sgd)
    assert isinstance(found, keras.Variable)
    sgd.learning_rate = 0.5
    assert float(found) == 0.5
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
    assert _keras.learning_rate_of(keras.optimizers.SGD(schedule)) is schedule


def test_config_of():
    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

    def function():
        return 0.1

    for source in (Schedule(), function):
        sgd = keras.optimizers.SGD(source, momentum=0.5)
        config = _keras.config_of(sgd)
        assert config["learning_rate"] is source
        assert config["momentum"] == 0.5
        assert _keras.learning_rate_of(sgd) is source
    number = _keras.config_of(keras.optimizers.SGD(0.25))["learning_rate"]
    assert number == 0.25


def test_step_counter_of():
    sgd = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    variable = keras.Variable([1.0])
    for _ in range(3):
        sgd.apply([tf.constant([1.0])], [variable])
    assert int(_keras.step_counter_of(sgd)) == 3
    assert int(sgd.iterations) == 1


def test_variables_built_on(model):
    adam = keras.optimizers.Adam()
    adam.build(model.trainable_variables)
    assert _keras.variables_built_on(adam) == model.trainable_variables


def test_start_averages(model):
    sgd = keras.optimizers.SGD(use_ema=True)
    sgd.build(model.trainable_variables)
    _keras.start_averages(sgd)
    sgd.finalize_variable_values(model.trainable_variables)
    assert np.abs(model.get_layer("one").kernel).max() > 0


def test_decays(model):
    one, two = (model.get_layer(name) for name in ("one", "two"))
    adam = keras.optimizers.AdamW(weight_decay=0.1)
    adam.exclude_from_weight_decay([one.kernel], ["bias"])
    adam.build(model.trainable_variables)
    assert not _keras.decays(adam, one.kernel)
    assert not _keras.decays(adam, two.bias)
    assert _keras.decays(adam, two.kernel)


@pytest.mark.parametrize(
    ("make", "slots"),
    [
        (lambda: keras.optimizers.SGD(), 0),
        (lambda: keras.optimizers.SGD(momentum=0.9), 1),
        (lambda: keras.optimizers.Adam(), 2),
        (lambda: keras.optimizers.Adam(amsgrad=True), 3),
        (lambda: keras.optimizers.Adam(use_ema=True), 3),
        (lambda: keras.optimizers.Adam(gradient_accumulation_steps=2), 3),
        (lambda: keras.optimizers.Adafactor(), None),
        (lambda: keras.optimizers.Lion(), 1),
    ],
)
def test_slots_of(model, make, slots):
    optimizer = make()
    variables = model.trainable_variables
    optimizer.build(variables)
    made = _keras.slots_of(optimizer)
    assert {index for _, index in made} <= set(range(len(variables)))
    found = {id(slot) for slot in made.values()}
    if slots is not None:
        assert len(made) == slots * len(variables)
    # What is left belongs to the optimizer as a whole.
    left = {v.name for v in optimizer.variables if id(v) not in found}
    assert left == {"iteration", "learning_rate"}
    for (kind, index), slot in made.items():
        if slots is not None:
            assert slot.shape == variables[index].shape, kind


def test_slots_of_as_many_variables_as_the_optimizer_has(model):
    """Its own variables are in a list, too."""
    optimizer = keras.optimizers.SGD()
    optimizer.build(model.trainable_variables[:2])
    assert len(optimizer.variables) == 2
    assert _keras.slots_of(optimizer) == {}


# -- Losses, metrics, and the rest of Trainer ---------------------------------


def test_compiled_loss(model):
    assert _keras.compiled_loss(model) is None
    model.compile("sgd", "mse")
    loss = _keras.compiled_loss(model)
    y, y_pred = floats(3, 2), np.zeros((3, 2), "float32")
    np.testing.assert_allclose(loss(y, y_pred), np.mean(y**2), rtol=1e-6)
    weights = np.array([1.0, 0.0, 0.0], "float32")
    np.testing.assert_allclose(
        loss(y, y_pred, weights), np.mean(y[0] ** 2) / 3, rtol=1e-6
    )


def test_compiled_parts_change_with_compile(model):
    model.compile("sgd", "mse", metrics=["mae"])
    parts = _keras.compiled_parts(model)
    assert parts[0] is model.optimizer
    assert _keras.compiled_parts(model) == parts
    *made, schedule = parts
    assert None not in made
    assert schedule is None
    model.compile("sgd", "mse", metrics=["mae"])
    *again, _ = _keras.compiled_parts(model)
    assert not any(a is b for a, b in zip(made, again, strict=True))


def test_compiled_parts_have_the_schedule(model):
    """It can be replaced without compiling anew."""
    model.compile("sgd", "mse")
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
    model.optimizer.learning_rate = schedule
    assert _keras.compiled_parts(model)[-1] is schedule


def test_loss_tracker_is_the_loss_in_the_logs(model):
    model.compile("sgd", "mse")
    tracker = _keras.loss_tracker(model)
    tracker.update_state(tf.constant(3.0), sample_weight=2)
    assert float(model.get_metrics_result()["loss"]) == 3.0
    model.reset_metrics()
    assert float(tracker.result()) == 0.0


def test_build_losses_and_metrics(model):
    model.compile("sgd", "mse", metrics=["mae"])
    y = keras.KerasTensor((None, 2))
    _keras.build_losses_and_metrics(model, y, model.outputs[0], None)
    assert list(model.get_metrics_result()) == ["loss", "mae"]
    assert _keras.compiled_loss(model).built
    variables = [v for m in model.metrics for v in m.variables]
    # Building counted no samples.
    assert all(float(v) == 0 for v in variables)
    _keras.build_losses_and_metrics(model, y, model.outputs[0], None)
    again = [v for m in model.metrics for v in m.variables]
    assert [id(v) for v in again] == [id(v) for v in variables]


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: a,
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: {"second": b, "first": a},
        lambda a, b: {"outer": [a, b]},
        lambda a, b: [a],
    ],
    ids=["one", "list", "tuple", "dict", "nested", "list of one"],
)
def test_pack_outputs(pack):
    inputs = keras.Input((4,))
    a, b = layers.Dense(2)(inputs), layers.Dense(3)(inputs)
    model = keras.Model(inputs, pack(a, b))
    x = floats(2, 4)
    wanted = model(x)
    flat = keras.tree.flatten(wanted)
    found = _keras.pack_outputs(model, flat)
    keras.tree.assert_same_structure(found, wanted)
    assert all(
        f is w for f, w in zip(keras.tree.flatten(found), flat, strict=True)
    )


def test_initial_epoch_of(model, tmp_path):
    """`BackupAndRestore` resumes at the epoch it says."""
    model.compile("sgd", "mse")
    assert _keras.initial_epoch_of(model) is None
    x, y = floats(4, 4), floats(4, 2)

    def stop(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(tmp_path)
    interrupt = keras.callbacks.LambdaCallback(on_epoch_begin=stop)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        model.fit(x, y, epochs=3, callbacks=[backup, interrupt], verbose=0)
    backup.set_model(model)
    backup.on_train_begin()
    assert _keras.initial_epoch_of(model) == 1


@pytest.mark.parametrize(
    ("profile_batch", "profiles"), [(0, False), (3, True), ((2, 4), True)]
)
def test_profiles(tmp_path, profile_batch, profiles):
    callback = keras.callbacks.TensorBoard(
        tmp_path, profile_batch=profile_batch
    )
    assert _keras.profiles(callback) is profiles


def built(optimizer, value=1.0):
    variable = keras.Variable([value, -value])
    optimizer.build([variable])
    return variable


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        lambda: keras.optimizers.Adam(0.1, epsilon=0.01),
        lambda: keras.optimizers.AdamW(0.1, weight_decay=0.0),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_momentum_step(make):
    """The step is what the last update has added."""
    optimizer = make()
    assert _keras.has_momentum(optimizer)
    variable = built(optimizer)
    assert _keras.momentum_step(optimizer, variable).numpy().tolist() == [0, 0]
    for gradient in ([1.0, -2.0], [0.5, 3.0]):
        before = variable.numpy()
        optimizer.apply([tf.constant(gradient)], [variable])
        step = _keras.momentum_step(optimizer, variable)
        np.testing.assert_allclose(step, variable.numpy() - before, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1),
        keras.optimizers.Adam(amsgrad=True),
        keras.optimizers.Nadam(),
    ],
)
def test_has_momentum(optimizer):
    assert not _keras.has_momentum(optimizer)


def test_current_learning_rate():
    """With a schedule it is that of the next step."""
    decay = keras.optimizers.schedules.ExponentialDecay(0.2, 1, 0.5)
    optimizer = keras.optimizers.SGD(decay)
    optimizer.iterations.assign(2)
    assert float(_keras.current_learning_rate(optimizer)) == pytest.approx(0.05)
    optimizer = keras.optimizers.SGD(0.3)
    assert float(_keras.current_learning_rate(optimizer)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "rate",
    [
        0.4,
        lambda: 0.4,
        keras.optimizers.schedules.PiecewiseConstantDecay([9], [0.4, 0.0]),
    ],
)
def test_scaled_learning_rate(rate):
    optimizer = keras.optimizers.SGD(rate, weight_decay=0.5)
    variable = built(optimizer)
    with _keras.scaled_learning_rate(optimizer, 0.5):
        optimizer.apply([tf.zeros(2)], [variable])
        assert float(optimizer.learning_rate) == pytest.approx(0.2)
    assert float(optimizer.learning_rate) == pytest.approx(0.4)
    np.testing.assert_allclose(variable, [0.9, -0.9], rtol=1e-6)


@pytest.mark.parametrize("kind", _keras.SAVING)
def test_batches_until_save(kind, tmp_path):
    """Where it says so, and nowhere else, does the callback save."""
    try:
        callback = kind(str(tmp_path / "at.keras"), save_freq=5)
    except ImportError as error:
        pytest.skip(str(error))
    for batches, window in ((7, 1), (4, 1), (9, 1), (8, 2), (8, 2)):
        promised = _keras.batches_until_save(callback, 0, window)
        for batch in range(window - 1, batches, window):
            saves = callback._should_save_on_batch(batch)
            assert saves == (batch + 1 == promised)
            if saves:
                until = _keras.batches_until_save(callback, batch + 1, window)
                promised = batch + 1 + until
    callback.save_freq = "epoch"
    assert _keras.batches_until_save(callback, 0, 1) is None
    assert _keras.batches_until_save(keras.callbacks.Callback(), 0, 1) is None


# -- Data ---------------------------------------------------------------------


def test_get_data_adapter():
    x, y = floats(5, 2), np.arange(5)
    adapter = _keras.get_data_adapter(
        x=x, y=y, batch_size=2, shuffle=False, steps_per_epoch=None
    )
    assert adapter.num_batches == 3
    adapter.on_epoch_begin()
    found = [y.numpy().tolist() for _, y in adapter.get_tf_dataset()]
    adapter.on_epoch_end()
    assert found == [[0, 1], [2, 3], [4]]


def test_remember_failures_of_a_generator():
    def batches():
        yield floats(2, 2), np.arange(2)
        yield floats(2, 2), np.arange(2)
        yield floats(2, 2), np.arange(2)
        raise KeyError("no such image")

    assert_remembers(batches())


@pytest.mark.parametrize("workers", [1, 2])
def test_remember_failures_of_a_py_dataset(workers):
    class Broken(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 3:
                raise KeyError("no such image")
            return floats(2, 2), np.arange(2)

    assert_remembers(Broken(workers=workers))


def test_remember_failures_of_a_data_loader():
    torch_adapter = _keras._data_adapters.torch_data_loader_adapter
    adapter = torch_adapter.TorchDataLoaderAdapter
    assert "self.get_numpy_iterator" in inspect.getsource(
        adapter.get_tf_dataset
    )


def assert_remembers(data):
    adapter = _keras.get_data_adapter(x=data)
    failures = []
    _keras.remember_failures(adapter, failures)
    dataset = adapter.get_tf_dataset()
    adapter.on_epoch_begin()
    with pytest.raises(tf.errors.OpError, match="no such image"):
        list(dataset)
    adapter.on_epoch_end()
    assert [type(failure) for failure in failures] == [KeyError]
    assert "no such image" in str(failures[0])


def test_layers_within(model):
    outer = keras.Sequential([keras.Input((4,)), model])
    found = _keras.layers_within(outer)
    assert {*found} >= {outer, model, *model.layers}


def test_check_names():
    a, b = keras.Input((2,), name="a"), keras.Input((1,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.Add()([a, b]))
    for x in ({"a": floats(4, 2), "b": floats(4, 1)}, [floats(4, 2)]):
        _keras.check_names(model, x)
    with pytest.raises(ValueError, match=r'Missing data for input "b"'):
        _keras.check_names(model, {"a": floats(4, 2), "c": floats(4, 1)})


def test_in_order_of_metrics(model):
    model.compile("sgd", "mse", metrics=["mse", "mae"])
    model.evaluate(floats(4, 4), floats(4, 2), verbose=0)
    logs = {"mae": 1.0, "loss": 2.0, "mse": 3.0}
    assert _keras.in_order_of_metrics(model, logs) == [2.0, 3.0, 1.0]
    assert _keras.in_order_of_metrics(model, {"loss": 2.0}) == 2.0


def test_train_validation_split():
    x, y = floats(10, 2), np.arange(10)
    (train_x, train_y, none), (val_x, val_y, _) = _keras.train_validation_split(
        (x, y, None), 0.3
    )
    assert (len(train_x), len(val_x)) == (7, 3)
    np.testing.assert_array_equal(train_y, y[:7])
    np.testing.assert_array_equal(val_y, y[7:])
    assert none is None


def test_tree_is_that_of_keras():
    """It knows `KerasTensor` structures, as `keras.tree` does."""
    assert _keras.tree.flatten({"b": 1, "a": [2, 3]}) == [2, 3, 1]
