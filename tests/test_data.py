"""Batches, from anything that `fit` takes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from fdg_keras.data import Batches
from fdg_keras.feeds import Feed
from fdg_keras.links import Link
from fdg_keras.slicing import trace_graph

CPU = "/job:localhost/replica:0/task:0/device:CPU:0"
X = np.arange(20, dtype="float32").reshape(10, 2)
Y = np.arange(10, dtype="int32")


@pytest.fixture
def graph():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    return trace_graph(model)


@pytest.fixture
def graph_of_two():
    a, b = keras.Input((2,), name="a"), keras.Input((1,), name="b")
    joined = keras.layers.Concatenate()([a, b])
    return trace_graph(keras.Model({"b": b, "a": a}, joined))


def first_rows(batches, count=None, ask=3):
    """Runs an epoch as the feeder does; the first column of each batch."""
    link = Link(batches.spec.inputs, 1000, CPU, "test")
    feed = Feed([(link, range(len(batches.spec.inputs)))], None)
    found = []
    with batches.epoch() as epoch:
        while epoch.limit is None or epoch.drawn < epoch.limit:
            wanted = ask if epoch.limit is None else epoch.limit - epoch.drawn
            if count is not None:
                wanted = min(wanted, count - epoch.drawn)
            fed = feed(epoch.iterator, wanted)
            epoch.drawn += fed
            epoch.stopped = epoch.drawn == count
            if fed < wanted or epoch.stopped:
                break
        while link.size():
            found.append(link.dequeue()[0].numpy()[:, 0].tolist())
    assert len(found) == epoch.drawn
    return found


def as_dataset(batch=4):
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(batch)


class Sequence(keras.utils.PyDataset):
    """Counts what Keras tells a data set."""

    def __init__(self):
        super().__init__()
        self.epochs = 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]

    def on_epoch_end(self):
        self.epochs += 1


def generate(stop=10):
    for start in range(0, stop, 4):
        yield X[start : start + 4], Y[start : start + 4]


SOURCES = {
    "arrays": lambda: {"x": X, "y": Y, "batch_size": 4, "shuffle": False},
    "tensors": lambda: {
        "x": tf.constant(X),
        "y": tf.constant(Y),
        "batch_size": 4,
        "shuffle": False,
    },
    "tf.data": lambda: {"x": as_dataset()},
    "PyDataset": lambda: {"x": Sequence()},
    "generator": lambda: {"x": generate()},
}

ROWS = [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]


# -- Every source -------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_batches_come_in_order_with_a_short_last_one(graph, name):
    batches = Batches(graph, **SOURCES[name]())
    assert first_rows(batches) == ROWS


@pytest.mark.parametrize("name", SOURCES)
def test_specs_leave_the_batch_size_open(graph, name):
    spec = Batches(graph, **SOURCES[name]()).spec
    assert [s.shape.as_list() for s in spec.inputs] == [[None, 2]]
    assert spec.inputs[0].dtype == tf.float32
    assert spec.y.shape.as_list() == [None]
    assert spec.sample_weight is None


@pytest.mark.parametrize("name", ["arrays", "tensors", "tf.data", "PyDataset"])
def test_every_epoch_begins_anew(graph, name):
    batches = Batches(graph, **SOURCES[name]())
    assert batches.steps == 3
    assert [first_rows(batches) for _ in range(3)] == [ROWS] * 3


def test_shuffled_arrays_come_in_an_order_that_the_seed_says(graph):
    orders = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        batches = Batches(graph, x=X, y=Y, batch_size=10, shuffle=True)
        orders.append(first_rows(batches)[0])
    assert all(sorted(order) == X[:, 0].tolist() for order in orders)
    assert orders[0] == orders[1] != orders[2]


def test_a_py_dataset_is_told_when_epochs_end(graph):
    dataset = Sequence()
    batches = Batches(graph, x=dataset)
    for _ in range(2):
        first_rows(batches)
    assert dataset.epochs == 2


def test_the_end_of_an_epoch_is_told_after_a_failure_too(graph):
    dataset = Sequence()
    batches = Batches(graph, x=dataset)

    def fails():
        with batches.epoch():
            raise ZeroDivisionError("while training")

    with pytest.raises(ZeroDivisionError, match="while training"):
        fails()
    assert dataset.epochs == 1


def test_only_inputs(graph):
    batches = Batches(graph, x=X, batch_size=4, shuffle=False)
    assert batches.spec.y is None
    assert first_rows(batches) == ROWS


def test_a_data_set_of_inputs_only(graph):
    dataset = tf.data.Dataset.from_tensor_slices(X).batch(4)
    batches = Batches(graph, x=dataset)
    assert batches.spec.y is None
    assert first_rows(batches) == ROWS


# -- Lengths ------------------------------------------------------------------


def test_an_unknown_length_is_learned_in_the_first_epoch(graph):
    dataset = as_dataset().filter(lambda x, y: True)
    batches = Batches(graph, x=dataset)
    assert batches.steps is None
    assert first_rows(batches) == ROWS
    assert batches.steps == 3
    assert first_rows(batches) == ROWS


def test_steps_per_epoch_go_on_where_the_last_epoch_ended(graph):
    batches = Batches(graph, 2, x=as_dataset().repeat())
    assert batches.steps == 2
    assert first_rows(batches) == ROWS[:2]
    assert first_rows(batches) == [ROWS[2], ROWS[0]]
    assert first_rows(batches) == ROWS[1:]


def test_a_reset_begins_anew(graph):
    """Validation sees the same batches after every epoch."""
    batches = Batches(graph, 2, x=as_dataset().repeat())
    for _ in range(2):
        batches.reset()
        assert first_rows(batches) == ROWS[:2]


def test_steps_per_epoch_of_a_generator(graph):
    batches = Batches(graph, 1, x=generate())
    assert [first_rows(batches) for _ in range(3)] == [[row] for row in ROWS]


def test_a_data_set_begins_anew_once_it_is_used_up(graph):
    batches = Batches(graph, 3, x=as_dataset())
    assert [first_rows(batches) for _ in range(2)] == [ROWS] * 2


def test_fewer_batches_than_steps_per_epoch(graph):
    batches = Batches(graph, 5, x=as_dataset())
    message = (
        r"ran out of data.*Expected 5 batches.*received 3\..*`.repeat\(\)`"
    )
    with pytest.warns(UserWarning, match=message):
        assert first_rows(batches) == ROWS


def test_an_epoch_that_was_stopped_has_not_run_out(graph, recwarn):
    batches = Batches(graph, 3, x=as_dataset().repeat())
    assert first_rows(batches, count=2) == ROWS[:2]
    assert not [w for w in recwarn if "ran out" in str(w.message)]


def test_the_limit_of_keras_on_steps(graph):
    keras.config.set_max_steps_per_epoch(2)
    try:
        with pytest.warns(UserWarning, match="Limiting steps_per_epoch to 2"):
            batches = Batches(graph, x=as_dataset())
        assert first_rows(batches) == ROWS[:2]
    finally:
        keras.config.set_max_steps_per_epoch(None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"x": as_dataset().take(0)},
        lambda: {"x": X[:0], "y": Y[:0], "batch_size": 4},
    ],
    ids=["none", "arrays"],
)
def test_an_empty_data_set(graph, make):
    """Known to be empty, it is refused before anything is done with it."""
    with pytest.raises(ValueError, match=r"empty: expected at least one batch"):
        Batches(graph, **make())


def test_a_data_set_that_turns_out_to_be_empty(graph):
    batches = Batches(graph, x=as_dataset().filter(lambda x, y: False))
    with pytest.raises(ValueError, match=r"empty: expected at least one batch"):
        first_rows(batches)


def test_a_generator_that_is_used_up(graph):
    generator = generate()
    list(generator)
    with pytest.raises(ValueError, match="must yield at least one batch"):
        Batches(graph, x=generator)


# -- Shapes, structures and dtypes --------------------------------------------


def test_inputs_are_in_the_order_of_the_graph(graph_of_two):
    """Whatever the order in a dictionary."""
    b = 100 + np.arange(10, dtype="float32")[:, None]
    names = [graph_of_two.symbols[v].name for v in graph_of_two.inputs]
    firsts = {"a": X[0, 0], "b": b[0, 0]}
    batches = Batches(graph_of_two, x={"a": X, "b": b}, shuffle=False)
    with batches.epoch() as epoch:
        inputs, _ = next(epoch.iterator)
        epoch.drawn = 1
    assert [float(t[0, 0]) for t in inputs] == [firsts[name] for name in names]


def test_targets_are_flat_and_end_in_the_batch_size(graph):
    y = {"one": Y, "two": Y[:, None]}
    batches = Batches(graph, x=X, y=y, batch_size=4, shuffle=False)
    sizes = []
    with batches.epoch() as epoch:
        for _, targets in epoch.iterator:
            one, two, size = targets
            assert one.shape == two.shape[:1] == [int(size)]
            sizes.append(int(size))
        epoch.drawn = len(sizes)
    assert sizes == [4, 4, 2]
    assert set(batches.spec.y) == {"one", "two"}


def test_sample_weights_come_after_the_targets(graph):
    weight = np.linspace(1, 2, 10, dtype="float32")
    data = {"x": X, "y": Y, "sample_weight": weight, "shuffle": False}
    batches = Batches(graph, **data)
    with batches.epoch() as epoch:
        _, (y, w, size) = next(epoch.iterator)
        epoch.drawn = 1
    np.testing.assert_array_equal(y, Y)
    np.testing.assert_array_equal(w, weight)
    assert int(size) == 10
    assert batches.spec.sample_weight.shape.as_list() == [None]


def test_class_weights_become_sample_weights(graph):
    batches = Batches(
        graph, x=X, y=Y % 2, class_weight={0: 1.0, 1: 5.0}, shuffle=False
    )
    assert batches.spec.sample_weight is not None
    with batches.epoch() as epoch:
        _, (_, weight, _) = next(epoch.iterator)
        epoch.drawn = 1
    np.testing.assert_array_equal(weight, [1, 5] * 5)


def test_inputs_get_the_dtype_of_the_model(graph):
    batches = Batches(graph, x=X.astype("int64"), y=Y)
    assert batches.spec.inputs[0].dtype == tf.float32


def test_a_missing_last_dimension_is_added():
    """As Keras does: a `[B]` for an input of shape `(1,)`."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    batches = Batches(trace_graph(model), x=X[:, 0], y=Y)
    assert batches.spec.inputs[0].shape.as_list() == [None, 1]


def test_shapes_that_do_not_fit(graph):
    message = r"do not fit.*expected batches of shape \(None, 2\).*\(None, 3\)"
    with pytest.raises(ValueError, match=message):
        Batches(graph, x=np.ones((4, 3), "float32"), y=Y[:4])


@pytest.mark.parametrize(
    "x",
    [
        tf.sparse.from_dense(np.eye(4, 2, dtype="float32")),
        tf.RaggedTensor.from_row_lengths(tf.range(4.0), [1, 1, 2, 0]),
    ],
    ids=["sparse", "ragged"],
)
def test_what_is_not_dense(graph, x):
    dataset = tf.data.Dataset.from_tensor_slices((x, Y[:4])).batch(2)
    with pytest.raises(ValueError, match=r"Expected dense tensors.*Received"):
        Batches(graph, x=dataset)


# -- The feed -----------------------------------------------------------------


def test_each_link_gets_the_inputs_it_carries(graph_of_two):
    b = 100 + np.arange(10, dtype="float32")[:, None]
    data = {"x": {"a": X, "b": b}, "y": Y, "batch_size": 4, "shuffle": False}
    batches = Batches(graph_of_two, **data)
    order = [graph_of_two.symbols[v].name for v in graph_of_two.inputs]
    links = [
        Link([batches.spec.inputs[order.index(name)]], 9, CPU, name)
        for name in "ab"
    ]
    target_specs = [batches.spec.y, tf.TensorSpec((), tf.int32)]
    targets = Link(target_specs, 9, CPU, "targets")
    feeds = [(link, [order.index(n)]) for link, n in zip(links, "ab")]
    feed = Feed(feeds, targets)
    with batches.epoch() as epoch:
        epoch.drawn = feed(epoch.iterator, 2)
        assert epoch.drawn == 2
        assert [link.size() for link in (*links, targets)] == [2, 2, 2]
        # Of two floats and one for each of four samples, and of targets.
        targets_bytes = 4 * batches.spec.y.dtype.size
        assert feed.batch_bytes == 4 * (2 + 1) * 4 + targets_bytes
        assert feed(epoch.iterator, 5) == 1
        assert feed(epoch.iterator, 5) == 0
    for start in (0, 4, 8):
        stop = start + 4
        np.testing.assert_array_equal(links[0].dequeue()[0], X[start:stop])
        np.testing.assert_array_equal(links[1].dequeue()[0], b[start:stop])
        y, size = targets.dequeue()
        np.testing.assert_array_equal(y, Y[start:stop])
        assert int(size) == len(Y[start:stop])


def test_a_failing_data_set_raises_its_own_error(graph):
    def fails(x, y):
        return tf.debugging.check_numerics(x, "a bad batch"), y

    x = X.copy()
    x[5] = np.nan
    dataset = tf.data.Dataset.from_tensor_slices((x, Y)).batch(4).map(fails)
    batches = Batches(graph, x=dataset)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a bad batch"):
        first_rows(batches)


@pytest.mark.parametrize("said", [None, True, False])
def test_data_are_not_tuned_unless_they_say_so(graph, said):
    """Its thread may hold up Ctrl-C for long."""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(2)
    options = tf.data.Options()
    options.autotune.ram_budget = 10**9
    if said is not None:
        options.autotune.enabled = said
    batches = Batches(graph, x=data.with_options(options))
    found = batches.dataset.options().autotune
    assert found.enabled == bool(said)
    assert found.ram_budget == 10**9
    assert not Batches(graph, x=X, y=Y).dataset.options().autotune.enabled
