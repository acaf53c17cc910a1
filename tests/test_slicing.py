"""From a model to an ordered graph, and from a graph to slices."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from fdg_keras import _keras
from fdg_keras.slicing import cut_graph, trace_graph


def names(nodes):
    return [node.name for node in nodes]


def run_slices(graph, cuts, arrays, training=False):
    """Runs the slices one after another, each with what crosses its cut."""
    values = dict(zip(graph.inputs, arrays))
    received = {}
    for part in cut_graph(graph, cuts):
        assert sorted(received) == sorted(part.receives)
        local = {v: values[v] for v in part.feeds} | received
        part.run(local, training)
        received = {v: local[v] for v in part.sends}
    return _keras.pack_outputs(
        graph.functional, [received[v] for v in graph.outputs]
    )


def assert_slices_equal(model, *arrays):
    """Cut everywhere it may be, a model computes what it did before."""
    arrays = [ops.convert_to_tensor(a) for a in arrays]
    graph = trace_graph(model)
    structure = graph.functional._inputs_struct
    wanted = model(keras.tree.pack_sequence_as(structure, arrays))
    found = run_slices(graph, graph.legal_cuts(), arrays)
    keras.tree.assert_same_structure(found, wanted)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def floats(*shape):
    return np.random.RandomState(0).standard_normal(shape).astype("float32")


def chain(*units):
    """A Sequential of dense layers `d0`, `d1`, ..."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            *(layers.Dense(n, name=f"d{i}") for i, n in enumerate(units)),
        ]
    )


# -- Graphs -------------------------------------------------------------------


def test_a_chain_is_in_order():
    graph = trace_graph(chain(5, 6, 3))
    assert names(graph.nodes) == ["d0", "d1", "d2"]
    assert graph.legal_cuts() == [0, 1]
    shapes = [graph.symbols[v].shape for v in (*graph.inputs, *graph.outputs)]
    assert shapes == [(None, 4), (None, 3)]


def test_slices_of_a_chain():
    model = chain(5, 6, 3)
    graph = trace_graph(model)
    first, second = cut_graph(graph, [1])
    assert names(first.nodes) == ["d0", "d1"]
    assert names(second.nodes) == ["d2"]
    assert first.feeds == graph.inputs
    assert first.receives == second.feeds == ()
    assert first.sends == second.receives == graph.nodes[1].outputs
    assert second.sends == graph.outputs
    assert second.layers == [model.get_layer("d2")]
    assert second.trainable_variables == model.get_layer("d2").variables
    assert_slices_equal(model, floats(2, 4))


def test_without_cuts_there_is_one_slice():
    graph = trace_graph(chain(5, 3))
    (whole,) = cut_graph(graph, [])
    assert list(whole.nodes) == graph.nodes
    assert whole.receives == ()


def test_branches():
    inputs = keras.Input((4,))
    left = layers.Dense(3, name="left")(inputs)
    right = layers.Dense(3, name="right")(inputs)
    outputs = layers.Add(name="join")([left, right])
    model = keras.Model(inputs, outputs)
    graph = trace_graph(model)
    assert graph.legal_cuts() == [0, 1]
    # A cut within parallel branches: the input is fed to both sides of it.
    first, second, third = cut_graph(graph, [0, 1])
    assert first.feeds == second.feeds == graph.inputs
    assert third.feeds == ()
    assert len(third.receives) == 2
    assert_slices_equal(model, floats(2, 4))


def test_a_skip_passes_through_stages_that_do_not_use_it():
    inputs = keras.Input((4,))
    skip = layers.Dense(5, name="skip")(inputs)
    h = layers.Dense(5, name="one")(skip)
    h = layers.Dense(5, name="two")(h)
    h = layers.Dense(5, name="three")(h)
    model = keras.Model(inputs, layers.Add(name="join")([h, skip]))
    graph = trace_graph(model)
    slices = cut_graph(graph, [0, 1, 2, 3])
    (made,) = graph.nodes[0].outputs
    assert [made in part.sends for part in slices] == [True] * 4 + [False]
    assert [len(part.sends) for part in slices] == [1, 2, 2, 2, 1]
    assert [made in part.receives for part in slices] == [False] + [True] * 4
    assert_slices_equal(model, floats(2, 4))


def test_what_is_not_needed_any_more_is_not_sent():
    inputs = keras.Input((4,))
    skip = layers.Dense(5, name="skip")(inputs)
    h = layers.Add(name="join")([layers.Dense(5, name="one")(skip), skip])
    model = keras.Model(inputs, layers.Dense(2, name="head")(h))
    slices = cut_graph(trace_graph(model), [0, 1, 2])
    assert [len(part.sends) for part in slices] == [1, 2, 1, 1]


def test_an_early_output_is_handed_on():
    inputs = keras.Input((4,))
    early = layers.Dense(5, name="early")(inputs)
    h = layers.Dense(3, name="two")(early)
    model = keras.Model(inputs, [early, layers.Dense(3, name="late")(h)])
    graph = trace_graph(model)
    slices = cut_graph(graph, [0, 1])
    assert slices[-1].sends == graph.outputs
    assert [graph.outputs[0] in part.sends for part in slices] == [True] * 3
    assert graph.outputs[0] in slices[-1].receives
    assert_slices_equal(model, floats(2, 4))


def test_outputs_keep_their_structure():
    inputs = {
        "a": keras.Input((4,), name="a"),
        "b": keras.Input((3,), name="b"),
    }
    h = layers.Dense(3, name="one")(inputs["a"]) + inputs["b"]
    model = keras.Model(inputs, {"sum": h, "head": layers.Dense(2)(h)})
    assert_slices_equal(model, floats(2, 4), floats(2, 3))


def test_a_model_input_that_is_used_late_is_fed_directly():
    a, b = keras.Input((4,)), keras.Input((3,))
    h = layers.Dense(3, name="one")(a)
    h = layers.Dense(3, name="two")(h)
    model = keras.Model([a, b], layers.Add(name="join")([h, b]))
    graph = trace_graph(model)
    slices = cut_graph(graph, [0, 1])
    assert [part.feeds for part in slices] == [
        (graph.inputs[0],),
        (),
        (graph.inputs[1],),
    ]
    assert [len(part.receives) for part in slices] == [0, 1, 1]
    assert_slices_equal(model, floats(2, 4), floats(2, 3))


def test_an_input_that_is_an_output():
    a, b = keras.Input((4,)), keras.Input((3,))
    h = layers.Dense(3, name="one")(a)
    model = keras.Model([a, b], [layers.Dense(2, name="two")(h), b])
    graph = trace_graph(model)
    first, second = cut_graph(graph, [0])
    assert first.feeds == graph.inputs[:1]
    assert second.feeds == graph.inputs[1:]
    assert_slices_equal(model, floats(2, 4), floats(2, 3))


def test_an_output_that_is_there_twice():
    inputs = keras.Input((4,))
    h = layers.Dense(3, name="one")(inputs)
    last = layers.Dense(2, name="two")(h)
    model = keras.Model(inputs, [last, h, last])
    assert_slices_equal(model, floats(2, 4))


def test_raw_operations_are_nodes():
    inputs = keras.Input((4,))
    h = layers.Dense(6, name="one")(inputs)
    h = ops.concatenate([h[:, 2:] * 2.0, ops.mean(h, -1, keepdims=True)], -1)
    model = keras.Model(inputs, ops.where(h > 0, h, -h) + 1)
    graph = trace_graph(model)
    assert len(graph.nodes) == 9
    assert graph.legal_cuts() == list(range(8))
    assert sum(bool(node.variables) for node in graph.nodes) == 1
    assert_slices_equal(model, floats(2, 4))


def test_an_operation_with_several_outputs():
    inputs = keras.Input((6,))
    a, b, c = ops.split(layers.Dense(6, name="one")(inputs), 3, axis=-1)
    model = keras.Model(inputs, a * b - c)
    graph = trace_graph(model)
    assert [len(node.outputs) for node in graph.nodes[:2]] == [1, 3]
    assert_slices_equal(model, floats(2, 6))


def test_tensors_as_keyword_arguments():
    query, value = keras.Input((5, 4)), keras.Input((3, 4))
    h = layers.Dense(4, name="one")(query)
    attention = layers.MultiHeadAttention(2, 2, name="attention")
    model = keras.Model([query, value], attention(h, value=value, key=value))
    assert_slices_equal(model, floats(2, 5, 4), floats(2, 3, 4))


def test_a_layer_with_its_initial_state():
    inputs = keras.Input((5, 4))
    _, h, c = layers.LSTM(3, return_state=True, name="encoder")(inputs)
    decoded = layers.LSTM(3, name="decoder")(inputs, initial_state=[h, c])
    model = keras.Model(inputs, decoded)
    assert_slices_equal(model, floats(2, 5, 4))


def test_masks_go_along_within_python():
    inputs = keras.Input((5,), dtype="int32")
    h = layers.Embedding(9, 4, mask_zero=True, name="embed")(inputs)
    h = layers.LSTM(3, return_sequences=True, name="first")(h)
    model = keras.Model(inputs, layers.LSTM(2, name="second")(h))
    x = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]], "int32")
    assert_slices_equal(model, x)
    # The mask does matter here, so the equality above shows something.
    graph = trace_graph(model)
    with_mask = run_slices(graph, [0], [ops.convert_to_tensor(x)])
    x[:, 3:] = 7
    assert not np.allclose(
        with_mask, run_slices(graph, [0], [ops.convert_to_tensor(x)])
    )


# -- Any graph ----------------------------------------------------------------


#: Each makes a `[B, 4]` of two others; `once` is a layer that may be shared.
STEPS = {
    "dense": lambda a, b, once: layers.Dense(4, "tanh")(a),
    "add": lambda a, b, once: layers.Add()([a, b]),
    "raw": lambda a, b, once: a * 0.5 - b,
    "shared": lambda a, b, once: once["layer"](a),
    "nested": lambda a, b, once: once["model"](a),
    "boolean": lambda a, b, once: ops.where(a > 0, a, b),
    "integer": lambda a, b, once: layers.Embedding(9, 4)(
        ops.cast(ops.clip(ops.sum(a + b, 1) * 2, 0, 8), "int32")
    ),
}
index = st.integers(0, 99)


def build_any(inputs, recipe, outputs):
    """A model of steps on whatever was computed before them."""
    keras.utils.clear_session(free_memory=False)
    once = {"layer": layers.Dense(4), "model": chain(3, 4)}
    symbols = [keras.Input((4,)) for _ in range(inputs)]
    made = []
    for step, i, j in recipe:
        found = symbols + made
        a, b = found[i % len(found)], found[j % len(found)]
        made.append(STEPS[step](a, b, once))
    chosen = [made[i % len(made)] for i in outputs]
    return keras.Model(symbols, [*chosen, made[-1]])


@given(
    st.integers(1, 2),
    st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), index, index),
        min_size=1,
        max_size=8,
    ),
    st.lists(index, min_size=1, max_size=2),
    st.data(),
)
@settings(max_examples=25)
def test_slicing_any_graph_changes_nothing(inputs, recipe, outputs, data):
    model = build_any(inputs, recipe, outputs)
    graph = trace_graph(model)
    legal = graph.legal_cuts()
    cuts = data.draw(st.sets(st.sampled_from(legal))) if legal else set()
    arrays = [ops.convert_to_tensor(floats(3, 4)) for _ in graph.inputs]
    structure = graph.functional._inputs_struct
    wanted = model(keras.tree.pack_sequence_as(structure, arrays))
    found = run_slices(graph, sorted(cuts), arrays)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


# -- `training` ---------------------------------------------------------------


def test_training_reaches_every_layer():
    inputs = keras.Input((200,))
    # Keras itself overrides a recorded `training=False` of a Functional.
    outputs = layers.Dropout(0.5, seed=1)(inputs, training=False)
    graph = trace_graph(keras.Model(inputs, outputs))
    x = np.ones((1, 200), "float32")
    dropped = [
        float(np.mean(np.array(run_slices(graph, [], [x], training)) == 0))
        for training in (True, False)
    ]
    assert dropped == [pytest.approx(0.5, abs=0.15), 0.0]


# -- Nested models ------------------------------------------------------------


def nested_model():
    inner = chain(5, 3)
    inner.name = "inner"
    middle_input = keras.Input((4,))
    middle = keras.Model(
        middle_input, layers.ReLU(name="relu")(inner(middle_input)), name="mid"
    )
    inputs = keras.Input((4,))
    h = layers.Dense(4, name="one")(inputs)
    return keras.Model(inputs, layers.Dense(2, name="head")(middle(h)))


def test_nested_models_are_inlined():
    model = nested_model()
    graph = trace_graph(model)
    assert names(graph.nodes) == [
        "one",
        "mid/inner/d0",
        "mid/inner/d1",
        "mid/relu",
        "head",
    ]
    assert graph.legal_cuts() == [0, 1, 2, 3]
    assert_slices_equal(model, floats(2, 4))


def test_a_backbone_and_a_head():
    backbone = chain(5, 6)
    backbone.name = "backbone"
    model = keras.Sequential([keras.Input((4,)), backbone, layers.Dense(2)])
    assert trace_graph(model).legal_cuts() == [0, 1]
    assert_slices_equal(model, floats(2, 4))


def test_a_nested_model_that_is_used_twice_shares_its_layers():
    a, b = keras.Input((4,)), keras.Input((4,))
    tower = chain(5, 3)
    tower.name = "tower"
    joined = layers.Subtract(name="join")([tower(a), tower(b)])
    model = keras.Model([a, b], layers.Dense(2, name="head")(joined))
    graph = trace_graph(model)
    assert names(graph.nodes).count("tower/d0") == 2
    assert [graph.nodes[p].name for p in graph.legal_cuts()] == [
        "tower/d1",
        "join",
    ]
    assert_slices_equal(model, floats(2, 4), floats(2, 4))


def test_a_subclassed_model_inside_stays_one_node():
    class Block(keras.Model):
        def __init__(self):
            super().__init__(name="block")
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x) * 2.0

    inputs = keras.Input((4,))
    h = layers.Dense(4, name="one")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(Block()(h)))
    graph = trace_graph(model)
    assert names(graph.nodes) == ["one", "block", "head"]
    assert len(graph.nodes[1].variables) == 2
    assert_slices_equal(model, floats(2, 4))


def test_a_nested_model_that_converts_its_inputs_stays_one_node():
    """Inlined, the conversion of a float to an integer would be lost."""
    lookup_input = keras.Input((3,), dtype="int32")
    lookup = keras.Model(
        lookup_input, layers.Embedding(9, 2)(lookup_input), name="lookup"
    )
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Flatten()(lookup(inputs * 2)))
    graph = trace_graph(model)
    assert "lookup" in names(graph.nodes)
    assert_slices_equal(model, np.array([[0.2, 1.6, 3.9]], "float32"))


@pytest.mark.filterwarnings("ignore:.*does not support masking")
def test_a_nested_model_that_is_given_a_mask_stays_one_node():
    """Inlined, its layers would have to find the mask on the tensor."""
    inner_input = keras.Input((5, 4))
    pool = layers.GlobalAveragePooling1D(name="pool")(inner_input)
    inner = keras.Model(inner_input, pool, name="inner")
    inputs = keras.Input((5,), dtype="int32")
    h = layers.Embedding(9, 4, mask_zero=True, name="embed")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(inner(h)))
    assert "inner" in names(trace_graph(model).nodes)
    assert_slices_equal(model, np.array([[1, 2, 3, 0, 0]], "int32"))


# -- Shared variables ---------------------------------------------------------


def shared_model():
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    h = layers.Dense(4, name="one")(inputs)
    h = layers.Dense(4, name="two")(shared(h))
    h = layers.Dense(4, name="three")(shared(h))
    return keras.Model(inputs, h)


def test_shared_layers_forbid_the_cuts_between_them():
    graph = trace_graph(shared_model())
    assert names(graph.nodes) == ["one", "shared", "two", "shared", "three"]
    assert graph.legal_cuts() == [0, 3]
    assert sorted(graph.forbidden_cuts()) == [1, 2]
    assert graph.forbidden_cuts()[1] == (
        "'shared/kernel' is used on both sides, by 'shared' and by 'shared'"
    )
    assert_slices_equal(shared_model(), floats(2, 4))


def test_a_layer_without_variables_may_be_shared():
    inputs = keras.Input((4,))
    relu = layers.ReLU(name="relu")
    h = relu(layers.Dense(4, name="one")(inputs))
    model = keras.Model(inputs, relu(layers.Dense(4, name="two")(h)))
    assert trace_graph(model).legal_cuts() == [0, 1, 2]
    assert_slices_equal(model, floats(2, 4))


def test_dropout_that_is_shared_has_a_seed_to_share():
    inputs = keras.Input((4,))
    dropout = layers.Dropout(0.5, name="dropout")
    h = dropout(layers.Dense(4, name="one")(inputs))
    model = keras.Model(inputs, dropout(layers.Dense(4, name="two")(h)))
    graph = trace_graph(model)
    assert graph.legal_cuts() == [0]
    assert "seed" in graph.forbidden_cuts()[1]


def test_tied_weights_forbid_cuts_too():
    inputs = keras.Input((3,), dtype="int32")
    embedding = layers.Embedding(7, 4, name="embed")

    class Unembed(layers.Layer):
        def __init__(self):
            super().__init__(name="unembed")
            self.embedding = embedding

        def call(self, x):
            return ops.matmul(x, ops.transpose(self.embedding.embeddings))

    h = layers.Dense(4, name="one")(embedding(inputs))
    model = keras.Model(inputs, Unembed()(h))
    graph = trace_graph(model)
    assert names(graph.nodes) == ["embed", "one", "unembed"]
    assert graph.legal_cuts() == []
    assert graph.forbidden_cuts()[0] == (
        "'embed/embeddings' is used on both sides, by 'embed' and by 'unembed'"
    )


# -- Variables of slices ------------------------------------------------------


def test_every_variable_belongs_to_one_slice():
    class Counts(layers.Layer):
        def __init__(self):
            super().__init__(name="counts")
            self.mean = keras.metrics.Mean(name="mean")

        def call(self, x):
            self.mean.update_state(ops.mean(x))
            return x

    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="frozen", trainable=False),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, name="drop"),
            Counts(),
            layers.Dense(2, name="head"),
        ]
    )
    slices = cut_graph(trace_graph(model), range(4))
    assert [len(part.trainable_variables) for part in slices] == [0, 2, 0, 0, 2]
    # Frozen weights; moving statistics; a seed; the metric's total and count.
    assert [len(part.state_variables) for part in slices] == [2, 2, 1, 2, 0]


def test_a_layer_used_twice_in_a_slice_counts_once():
    (whole,) = cut_graph(trace_graph(shared_model()), [])
    assert len(whole.layers) == 4
    assert len(whole.trainable_variables) == 8


# -- What cannot be sliced ----------------------------------------------------


def test_a_subclassed_model():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Subclassed()
    model(floats(2, 4))
    with pytest.raises(ValueError, match=r"Make it functional.*Received: "):
        trace_graph(model)
    # What the message advises works.
    inputs = keras.Input((4,))
    advised = keras.Model(inputs, model.call(inputs))
    assert_slices_equal(advised, floats(2, 4))
    assert advised.variables == model.variables


def test_a_functional_model_with_a_call_of_its_own():
    class Doubled(keras.Model):
        def call(self, x):
            return 2 * super().call(x)

    inputs = keras.Input((4,))
    model = Doubled(inputs, layers.Dense(2)(inputs))
    with pytest.raises(ValueError, match="whose `call` is Keras' own"):
        trace_graph(model)


def test_a_sequential_that_is_not_built():
    model = keras.Sequential([layers.Dense(2)])
    message = r"has no input shape yet.*`model.build\(input_shape\)`"
    with pytest.raises(ValueError, match=message):
        trace_graph(model)
    model.build((None, 4))
    assert_slices_equal(model, floats(2, 4))


def test_what_is_no_model():
    with pytest.raises(ValueError, match=r"Expected a `keras.Model`.*Dense"):
        trace_graph(layers.Dense(2))


def test_slicing_leaves_the_model_as_it_was(tmp_path):
    model = nested_model()
    x = floats(2, 4)
    before = model.predict(x, verbose=0)
    run_slices(trace_graph(model), [0, 2], [x])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), before)
