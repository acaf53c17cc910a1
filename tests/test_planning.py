"""Which layers go where."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import zoo
from keras import layers

from fdg_keras import Plan, StagePlan, costs
from fdg_keras.costs import node_cost
from fdg_keras.planning import choose_cuts, make_plan
from fdg_keras.slicing import cut_graph, trace_graph

DEVICES = [f"/job:localhost/replica:0/task:0/device:CPU:{i}" for i in range(8)]


@pytest.fixture(autouse=True)
def costs_by_hand(monkeypatch):
    """Pins the cost of an element, so that costs can be checked by hand."""
    monkeypatch.setattr(costs, "_OPERATIONS_PER_ELEMENT", 8.0)


def graph_of(*made, shape=(4,), dtype=None):
    """A chain of layers."""
    model = keras.Sequential([keras.Input(shape, dtype=dtype), *made])
    return trace_graph(model)


def chain(*units):
    return graph_of(
        *(layers.Dense(n, name=f"d{i}") for i, n in enumerate(units))
    )


def elements(graph, values):
    return sum(int(np.prod(graph.symbols[v].shape[1:])) for v in values)


def slowest(graph, cuts):
    """Cost of the slowest stage, with what it receives and sends."""
    found = []
    for part in cut_graph(graph, cuts):
        moved = elements(graph, part.receives)
        if part.sends != graph.outputs:
            moved += elements(graph, part.sends)
        work = sum(node_cost(graph, node) for node in part.nodes)
        found.append(work + costs._OPERATIONS_PER_ELEMENT * moved)
    return max(found)


def test_rows_of_a_sample_count():
    """Layers cost the same, whichever axis their rows are in."""
    inputs = keras.Input((16, 32))
    apart = layers.Dense(8)(layers.Dense(32)(inputs))
    h = keras.ops.reshape(inputs, (-1, 32))
    h = layers.Dense(8)(layers.Dense(32)(h))
    folded = keras.ops.reshape(h, (-1, 16, 8))
    plain, other = (
        trace_graph(keras.Model(inputs, outputs)) for outputs in (apart, folded)
    )
    assert other.rows == [1, 16, 16, 16, 1]
    assert [node_cost(other, n) for n in other.nodes[1:3]] == [
        node_cost(plain, n) for n in plain.nodes
    ]
    parts = cut_graph(other, [1])
    assert make_plan(other, parts, ["", ""]).stages[0].sends == 16 * 32


# -- Balance ------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "name", ["conv", "unet", "attention", "two_inputs", "nested", "shared"]
)
def test_no_other_cuts_are_better(name, splits):
    graph = trace_graph(zoo.ZOO[name]().model)
    cuts = choose_cuts(graph, splits)
    assert len(cuts) == splits - 1
    assert set(cuts) <= set(graph.legal_cuts())
    assert cuts == sorted(set(cuts))
    best = min(
        slowest(graph, candidate)
        for candidate in itertools.combinations(graph.legal_cuts(), splits - 1)
    )
    assert slowest(graph, cuts) == pytest.approx(best)


def test_equal_layers_are_dealt_evenly():
    graph = chain(*[64] * 8)
    assert choose_cuts(graph, 2) == [3]
    assert choose_cuts(graph, 4) == [1, 3, 5]


def test_a_heavy_layer_gets_a_stage_of_its_own():
    graph = chain(4, 4, 2000, 4, 4)
    # The layer after it has as many weights; the others have next to none.
    assert choose_cuts(graph, 2) == [2]


def test_every_cut_there_is():
    graph = chain(5, 6, 7, 8)
    assert choose_cuts(graph, 4) == [0, 1, 2]


def test_cuts_go_where_little_crosses():
    """Between two halves of equal work, behind the bottleneck."""
    graph = chain(300, 2, 300, 2)
    assert choose_cuts(graph, 2) == [1]


# -- Costs --------------------------------------------------------------------


def cost(layer, shape, dtype=None):
    graph = graph_of(layer, shape=shape, dtype=dtype)
    return node_cost(graph, graph.nodes[-1])


@pytest.mark.parametrize(
    ("layer", "shape", "operations", "moved"),
    [
        # Multiplications and additions; elements read and written.
        (lambda: layers.Dense(5), (4,), 2 * 4 * 5, 4 + 5),
        (lambda: layers.Dense(5), (7, 4), 2 * 4 * 5 * 7, 28 + 35),
        (lambda: layers.ReLU(), (4,), 0, 4 + 4),
        (
            lambda: layers.Conv2D(5, 3, 2, "same"),
            (8, 8, 2),
            2 * (3 * 3 * 2 * 5) * 16,
            128 + 80,
        ),
        (
            lambda: layers.Conv2D(5, 3, padding="same"),
            (8, 8, 2),
            2 * (3 * 3 * 2 * 5) * 64,
            128 + 320,
        ),
        (
            lambda: layers.LSTM(5),
            (7, 4),
            2 * (4 * 20 + 5 * 20) * 7,
            28 + 5,
        ),
        (lambda: layers.BatchNormalization(), (8, 8, 2), 0, 128 + 128),
    ],
    ids=["dense", "time", "relu", "strides", "conv", "lstm", "norm"],
)
def test_costs(layer, shape, operations, moved):
    assert cost(layer(), shape) == operations + 8 * moved


def test_an_embedding_looks_up_and_does_not_multiply():
    layer = layers.Embedding(10**5, 4)
    assert cost(layer, (7,), "int32") == 8 * (7 + 28)


def test_channels_first():
    layer = layers.Conv2D(5, 3, padding="same", data_format="channels_first")
    assert cost(layer, (2, 8, 8)) == 2 * 90 * 64 + 8 * (128 + 320)


def test_unknown_sizes_do_not_count():
    assert cost(layers.Dense(5), (None, 4)) == 2 * 20 + 8 * (4 + 5)


# -- Names --------------------------------------------------------------------


def test_names_of_layers_to_cut_after():
    assert choose_cuts(chain(5, 6, 7, 8), ["d0", "d2"]) == [0, 2]


def test_no_names_make_one_stage():
    assert choose_cuts(chain(5, 6), []) == []


def test_a_tuple_of_names():
    assert choose_cuts(chain(5, 6), ("d0",)) == [0]


def test_names_within_and_of_nested_models():
    graph = trace_graph(zoo.nested().model)
    found = [node.name for node in graph.nodes]
    for name, last in [
        ("backbone/one", "backbone/one"),
        ("backbone/block", "backbone/block/relu"),
        ("backbone", "backbone/add"),
    ]:
        assert choose_cuts(graph, [name]) == [found.index(last)]


def test_a_layer_that_is_used_several_times_is_cut_after_its_last_use():
    inputs = keras.Input((4,))
    relu = layers.ReLU(name="relu")
    h = relu(layers.Dense(4, name="one")(inputs))
    h = relu(layers.Dense(4, name="two")(h))
    graph = trace_graph(keras.Model(inputs, layers.Dense(2, name="head")(h)))
    assert choose_cuts(graph, ["relu"]) == [3]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nope"], r"No layer is called 'nope'\. Expected names among \['d0'"),
        (["d0", "nope"], "No layer is called 'nope'"),
        ([0], "No layer is called 0"),
        (["d1", "d0"], r"'d0' is out of order\. Received: \['d1', 'd0'\]"),
        (["d0", "d0"], "each once; 'd0' is out of order"),
        (["d2"], r"'d2' ends the model.*Received: \['d2'\]"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=message):
        choose_cuts(chain(5, 6, 7), names)


def test_a_name_without_the_nested_model_gets_a_hint():
    graph = trace_graph(zoo.nested().model)
    message = r"Did you mean one of \['backbone/block/norm'\]\?"
    with pytest.raises(ValueError, match=message):
        choose_cuts(graph, ["norm"])


def test_a_long_list_of_names_is_shortened():
    graph = chain(*[2] * 60)
    with pytest.raises(ValueError, match=r"'d37', '\.\.\.', 'd59'\]"):
        choose_cuts(graph, ["nope"])


def test_a_cut_that_a_shared_layer_forbids():
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    h = layers.ReLU(name="between")(shared(inputs))
    graph = trace_graph(keras.Model(inputs, shared(h)))
    message = (
        r"cannot be cut after 'between': 'shared/kernel' is used on both "
        r"sides, by 'shared' and by 'shared'.*Cut before or after all layers "
        r"that share it\. Received: \['between'\]"
    )
    with pytest.raises(ValueError, match=message):
        choose_cuts(graph, ["between"])


# -- What is no `splits` ------------------------------------------------------


@pytest.mark.parametrize("splits", [True, "d0", 2.0, None, object()])
def test_bad_splits(splits):
    message = "Expected `splits` to be a number of stages, a list of names"
    with pytest.raises(ValueError, match=message):
        choose_cuts(chain(5, 6), splits)


@pytest.mark.parametrize("splits", [0, -1, 4, 100])
def test_numbers_out_of_range(splits):
    message = rf"can be cut into 1 to 3 stages.*Received: splits={splits}"
    with pytest.raises(ValueError, match=message):
        choose_cuts(chain(5, 6, 7), splits)


def test_shared_layers_leave_fewer_cuts():
    graph = trace_graph(zoo.shared().model)
    possible = len(graph.legal_cuts()) + 1
    forbidden = len(graph.nodes) - possible
    message = f"1 to {possible} stages.*and {forbidden} of the places between"
    with pytest.raises(ValueError, match=message):
        choose_cuts(graph, possible + 1)
    assert len(choose_cuts(graph, possible)) == possible - 1


def test_a_numpy_integer_is_a_number():
    assert choose_cuts(chain(5, 6), np.int64(2)) == [0]


# -- Plans --------------------------------------------------------------------


def plan_of(graph, splits):
    slices = cut_graph(graph, choose_cuts(graph, splits))
    return make_plan(graph, slices, DEVICES[: len(slices)])


def test_what_a_plan_says():
    plan = plan_of(chain(5, 6, 7), ["d1"])
    assert plan == Plan(
        (
            StagePlan(
                device=DEVICES[0],
                layers=("d0", "d1"),
                parameters=4 * 5 + 5 + 5 * 6 + 6,
                operations=2.0 * (20 + 30) + 8 * (4 + 5 + 5 + 6),
                sends=6,
                costs=(2.0 * 20 + 8 * 9, 2.0 * 30 + 8 * 11),
                counts=(4 * 5 + 5, 5 * 6 + 6),
            ),
            StagePlan(
                device=DEVICES[1],
                layers=("d2",),
                parameters=6 * 7 + 7,
                operations=2.0 * 42 + 8 * (6 + 7),
                sends=7,
                costs=(2.0 * 42 + 8 * 13,),
                counts=(6 * 7 + 7,),
            ),
        )
    )
    assert plan.cuts == (2,)


def test_a_plan_can_be_used_again():
    plan = plan_of(chain(5, 6, 7, 8), 3)
    assert choose_cuts(chain(5, 6, 7, 8), plan) == [c - 1 for c in plan.cuts]
    assert plan_of(chain(5, 6, 7, 8), plan) == plan


def test_a_plan_of_one_stage():
    plan = plan_of(chain(5, 6), 1)
    assert plan.cuts == ()
    assert choose_cuts(chain(5, 6), plan) == []


def test_a_plan_for_another_model():
    plan = plan_of(chain(5, 6, 7), 2)
    other = graph_of(*(layers.Dense(4, name=n) for n in ("d0", "x", "d2")))
    message = "another model: expected layer 'd1' at position 1, received 'x'"
    with pytest.raises(ValueError, match=message):
        choose_cuts(other, plan)


@pytest.mark.parametrize("measured", [False, True])
def test_a_plan_for_a_model_of_other_widths(measured):
    """The layer is named, whatever the plan knows of times."""
    plan = plan_of(chain(5, 6, 7, 8), 2)
    if measured:
        stages = [
            dataclasses.replace(
                stage,
                costs=(0.1,) * len(stage.layers),
                forward_s=0.1,
                backward_s=0.1,
            )
            for stage in plan.stages
        ]
        plan = dataclasses.replace(plan, stages=tuple(stages))
    for other, layer in (
        (chain(5, 6, 9, 8), "d2"),
        (chain(5, 6, 7, 9), "d3"),
        (chain(5, 6, 9, 8, 8), "d2"),
    ):
        message = f"another model: .* The first that differs is '{layer}'"
        with pytest.raises(ValueError, match=message):
            choose_cuts(other, plan)


def test_a_plan_for_a_model_with_layers_swapped():
    """Their numbers may be others, as Keras counts on, but no other order."""

    def named(*names):
        return graph_of(*(layers.Dense(4, name=name) for name in names))

    plan = plan_of(named("b", "b_1", "c", "b_10", "b_9"), 2)
    assert choose_cuts(named("b_2", "b_3", "c_1", "b_12", "b_4"), plan)
    message = r"expected layer 'b_1' at position 1, received 'b_10'"
    with pytest.raises(ValueError, match=message):
        choose_cuts(named("b", "b_10", "c", "b_9", "b_1"), plan)


def test_a_plan_for_a_model_with_nested_layers_swapped():
    def nested(*names):
        inner = [
            keras.Sequential([layers.Dense(4, name="b")], name=name)
            for name in names
        ]
        return graph_of(*inner)

    plan = plan_of(nested("m_1", "m_2"), 2)
    assert choose_cuts(nested("m_3", "m_4"), plan) == [0]
    with pytest.raises(ValueError, match=r"'m_1/b' at position 0, .*'m_2/b'"):
        choose_cuts(nested("m_2", "m_1"), plan)


@pytest.mark.parametrize("units", [(5, 6), (5, 6, 7, 8)])
def test_a_plan_for_a_model_of_another_length(units):
    plan = plan_of(chain(5, 6, 7), 2)
    message = f"expected 3 layers and operations, received {len(units)}"
    with pytest.raises(ValueError, match=message):
        choose_cuts(chain(*units), plan)


def test_a_plan_prints_as_a_table():
    assert str(plan_of(chain(500, 600, 70), ["d0"])) == (
        "stage  device  from  to  layers  parameters  work %  sends\n"
        "    0  CPU:0   d0    d0       1       2,500       1    500\n"
        "    1  CPU:1   d1    d2       2     342,670      99      -"
    )


@pytest.mark.parametrize(
    "devices", [[], ["CPU:0"], ["CPU:0"] * 3, "CPU:0", "ab", None, 2, [0, 1]]
)
def test_a_plan_has_a_device_for_each_stage(devices):
    message = r"one for each of the 2 stages\. Received: devices="
    with pytest.raises(ValueError, match=message):
        plan_of(chain(5, 6, 7), 2).on(devices)


def test_a_plan_that_moves_says_once_where_it_was_measured():
    plan = dataclasses.replace(
        plan_of(chain(5, 6, 7), 2).on(["x", "y"]), step_s=0.1
    )
    moved = plan.on(["GPU:0", "GPU:1"])
    assert moved.notes == (
        "What is expected here was measured for x, y, but the stages "
        "are on GPU:0, GPU:1.",
    )
    assert moved.on(["a", "b"]).notes == (
        "What is expected here was measured for x, y, but the stages "
        "are on a, b.",
    )
    assert Plan.from_json(moved.to_json()) == moved
    assert moved.on(["x", "y"]) == plan
    unknown = plan_of(chain(5, 6, 7), 2)
    assert unknown.on(["a", "b"]).on(DEVICES[:2]) == unknown


def test_devices_of_other_machines_can_be_told_apart():
    devices = [f"/job:worker/replica:0/task:{i}/device:GPU:0" for i in "01"]
    graph = chain(5, 6)
    table = str(make_plan(graph, cut_graph(graph, [0]), devices))
    assert all(device in table for device in devices)
