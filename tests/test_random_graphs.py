"""Models and cuts that nobody thought of.

Recipes of `graphs.py`, cut anywhere. In a usual run 200 models are sliced and
run; 200 are trained without delay, one stage after the other; 30 are trained
without delay in compiled stages, and 8 with a delay. The examples of the first
two must be as various as `graph_variety.py` says. With
`--hypothesis-profile=fuzz`, as in `scripts/fuzz.sh`, the first three properties
see as many examples as that profile says, and the last a quarter.
"""

import functools
from collections.abc import Callable
from typing import Any

import graphs
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
import zoo
from graph_variety import Variety
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matching import TOLERANCE, assert_same_weights

import fdg_keras
from fdg_keras import _keras
from fdg_keras.planning import make_plan
from fdg_keras.plans import Plan
from fdg_keras.slicing import Graph, cut_graph, trace_graph

pytestmark = [
    pytest.mark.slow,
    # Of hundreds of models, not of one.
    pytest.mark.timeout(900),
    # What does not support masks drops them, in the model as in its slices.
    pytest.mark.filterwarnings("ignore:.*does not support masking"),
    # Of layers before integers or comparisons, in both trainings.
    pytest.mark.filterwarnings("ignore:Gradients do not exist"),
]

#: Which of the legal cuts; few, because each stage takes its time to trace, but
#: more than one at least in every other example, to skip stages.
cuts = st.lists(st.integers(0, 50), min_size=1, max_size=3) | st.lists(
    st.integers(0, 50), min_size=2, max_size=3, unique=True
)


def examples(usual: int, share: int = 1) -> Any:
    """Settings with the examples of a usual run, or of the profile `fuzz`."""
    if settings.default == settings.get_profile("fuzz"):
        usual = max(1, settings.default.max_examples // share)
    # Without looking for a smaller example of a failure, and without looking
    # into it: either would take many times as long as finding it.
    return settings(max_examples=usual, phases=list(Phase)[:3])


def legal(graph: Graph, cuts: list[int]) -> list[int]:
    """Returns legal cut positions that the drawn numbers stand for."""
    found = graph.legal_cuts()
    return sorted({found[-1 - i % len(found)] for i in cuts}) if found else []


def plan(model: keras.Model, cuts: list[int]) -> Plan:
    """Returns a plan with these cuts, which have no names if not of layers."""
    graph = trace_graph(model)
    slices = cut_graph(graph, legal(graph, cuts))
    return make_plan(graph, slices, ["CPU:0"] * len(slices))


def tensors(x: Any) -> Any:
    return keras.tree.map_structure(tf.convert_to_tensor, x)


def sent(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a copy, as it arrives at the next stage, with its mask."""
    copy = tf.identity(tensor)
    mask = _keras.get_mask(tensor)
    if mask is not None:
        _keras.set_mask(copy, tf.identity(mask))
    return copy


def run_slices(graph: Graph, cuts: list[int], x: Any, training: bool) -> Any:
    """Runs the slices one after another, each with what crosses its cut."""
    flat = _keras.standardize_inputs(graph.functional, x)
    values = dict(zip(graph.inputs, flat))
    received: dict[int, tf.Tensor] = {}
    for part in cut_graph(graph, cuts):
        assert sorted(received) == sorted(part.receives)
        local = {v: sent(values[v]) for v in part.feeds} | received
        part.run(local, training)
        received = {v: sent(local[v]) for v in part.sends}
    outputs = [received[v] for v in graph.outputs]
    return _keras.pack_outputs(graph.functional, outputs)


variety = Variety()


@variety.of
@examples(200)
@given(graphs.recipes(), cuts, st.booleans())
def test_slices_compute_what_the_model_does(recipe, cuts, training):
    """Outputs, and the variables that a forward updates."""
    whole, sliced = graphs.build(recipe), graphs.build(recipe)
    graph = trace_graph(sliced.model)
    positions = legal(graph, cuts)
    variety.add(graph, positions)
    x = tensors(whole.x)
    wanted = whole.model(x, training=training)
    found = run_slices(graph, positions, x, training)
    keras.tree.assert_same_structure(found, wanted)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted)):
        assert np.isfinite(b).all(), "the model is no good example"
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        masks = [_keras.get_mask(t) for t in (a, b)]
        assert [m is None for m in masks] in ([True] * 2, [False] * 2)
        if masks[0] is not None:
            np.testing.assert_array_equal(*masks)
    assert_same_weights(sliced.model, whole.model)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    # A large epsilon: a gradient that is zero but for rounding stays small.
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=0.01),
}
optimizers = st.sampled_from(sorted(OPTIMIZERS))


def make_trainer(
    case: zoo.Case,
    cuts: list[int],
    optimizer: str,
    delay: int,
    run_eagerly: bool = False,
) -> fdg_keras.Trainer:
    case.model.compile(
        OPTIMIZERS[optimizer](), case.loss, run_eagerly=run_eagerly
    )
    return fdg_keras.Trainer(case.model, plan(case.model, cuts), delay=delay)


def fit(fitted: Any, case: zoo.Case) -> dict[str, list[float]]:
    return fitted.fit(
        case.x,
        case.y,
        batch_size=graphs.BATCH_SIZE,
        shuffle=False,
        verbose=0,
    ).history


def up_to_rounding(check: Callable[[float], None]) -> None:
    """Checks in float32, and in float64 where rounding has the last word.

    A gradient that is a small difference of large numbers is mostly rounding:
    what computes the same in another order may be further off than the usual
    tolerance. In float64 it is not.

    Args:
        check: Compares, given the error that is tolerated.
    """
    try:
        check(TOLERANCE)
    except AssertionError:
        check(100 * TOLERANCE)
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        try:
            check(1e-9)
        finally:
            keras.config.set_floatx("float32")
            keras.config.set_dtype_policy("float32")


def assert_without_delay_it_is_model_fit(
    recipe: graphs.Recipe,
    cuts: list[int],
    optimizer: str,
    run_eagerly: bool,
    tolerance: float,
) -> None:
    case, expected = graphs.build(recipe), graphs.build(recipe)
    trainer = make_trainer(case, cuts, optimizer, 0, run_eagerly)
    graph = trace_graph(case.model)
    variety.add(graph, legal(graph, cuts))
    # Eagerly, which takes less time than compiling for so few batches.
    expected.model.compile(
        OPTIMIZERS[optimizer](), expected.loss, run_eagerly=True
    )
    found, wanted = fit(trainer, case), fit(expected.model, expected)
    assert_same_weights(case.model, expected.model, tolerance=tolerance)
    # Eagerly, Keras weighs the losses of single outputs in another way.
    np.testing.assert_allclose(
        found["loss"], wanted["loss"], rtol=tolerance, atol=0.1 * tolerance
    )


@variety.of
@examples(200)
@given(graphs.recipes(), cuts, optimizers)
def test_without_delay_stages_one_by_one_are_model_fit(recipe, cuts, optimizer):
    """Forwards, backwards, masks, losses and updates; no links, no loops."""
    up_to_rounding(
        functools.partial(
            assert_without_delay_it_is_model_fit, recipe, cuts, optimizer, True
        )
    )


@examples(30)
@given(graphs.recipes(), cuts, optimizers)
def test_without_delay_it_is_model_fit(recipe, cuts, optimizer):
    up_to_rounding(
        functools.partial(
            assert_without_delay_it_is_model_fit, recipe, cuts, optimizer, False
        )
    )


@examples(8, share=4)
@given(graphs.recipes(), cuts, optimizers)
def test_with_delay_it_is_the_reference(recipe, cuts, optimizer):
    """Through the stages the trained model predicts what it does at home."""

    def check(tolerance: float) -> None:
        case, expected = graphs.build(recipe), graphs.build(recipe)
        trainer = make_trainer(case, cuts, optimizer, delay=2)
        history = fit(trainer, case)
        x, y = expected.x, keras.tree.flatten(expected.y)
        result = reference.train(
            expected.model,
            [stage.layers for stage in trainer.plan.stages],
            reference.split_batches(graphs.BATCH_SIZE, x, y),
            keras.tree.flatten(expected.loss),
            OPTIMIZERS[optimizer](),
            delay=2,
        )
        assert_same_weights(case.model, expected.model, tolerance=tolerance)
        np.testing.assert_allclose(
            history["loss"],
            result.epoch_losses,
            rtol=tolerance,
            atol=0.1 * tolerance,
        )
        found = trainer.predict(case.x, graphs.BATCH_SIZE, verbose=0)
        wanted = case.model(tensors(case.x), training=False)
        keras.tree.assert_same_structure(found, wanted)
        for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted)):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    up_to_rounding(check)
