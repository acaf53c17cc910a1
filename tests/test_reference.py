"""The references, against Keras and against each other.

They are what the library is judged by, so nothing of the library is used.
"""

import itertools

import keras
import numpy as np
import pytest
import reference
import reference_by_hand
import reference_segments
import zoo
from grid import FULL, OPTIMIZERS, ORDERS, SHRINKS, Setting, pairwise
from matching import TOLERANCE, assert_same_weights, relative_error

#: Cases that are chains of layers, in the order of `model.layers`.
CHAINS = ["mlp", "conv", "activity"]


def batches_of(case):
    return reference.split_batches(zoo.BATCH_SIZE, case.x, case.y)


def chain_groups(case, K):
    """Layer names of each stage of a chain."""
    names = [
        layer.name
        for layer in case.model.layers
        if not isinstance(layer, keras.layers.InputLayer)
    ]
    ends = [names.index(cut) + 1 for cut in case.cuts.get(K, [])]
    starts = [0, *ends]
    return [
        names[i:j] for i, j in zip(starts, [*ends, len(names)], strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    itertools.product(zoo.ZOO, ("sgd", "adam"))
    if FULL
    else [("mlp", "adam"), ("conv", "sgd"), ("shared", "sgd")],
)
def test_without_delay_it_is_model_fit(name, optimizer):
    setting = Setting(1, 0, "forward_first", 1.0, optimizer)
    expected, case = zoo.ZOO[name](), zoo.ZOO[name]()
    expected.model.compile(setting.make_optimizer(), expected.loss)
    history = expected.model.fit(
        expected.x,
        expected.y,
        batch_size=zoo.BATCH_SIZE,
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    result = reference.train(
        case.model,
        [[layer.name for layer in case.model.layers]],
        batches_of(case),
        case.loss,
        setting.make_optimizer(),
        delay=0,
        epochs=2,
    )
    assert_same_weights(case.model, expected.model)
    np.testing.assert_allclose(
        result.epoch_losses, history.history["loss"], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, Setting(*values))
        for name, *values in pairwise(
            CHAINS, (2, 3, 4), (1, 2, 3), ORDERS, SHRINKS, OPTIMIZERS
        )
    ],
    ids=str,
)
def test_late_gradients_equal_stages_with_stashes(name, setting):
    """The design's two descriptions of stash="exact" are one training."""
    losses, models = [], []
    for train in (reference.train, reference_segments.train):
        case = zoo.ZOO[name]()
        result = train(
            case.model,
            chain_groups(case, setting.K),
            batches_of(case),
            case.loss,
            setting.make_optimizer(),
            **setting.rule,
            epochs=2,
        )
        losses.append(result.losses)
        models.append(case.model)
    assert_same_weights(*models)
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_without_delay_all_stashes_agree(K):
    """With no update in between, all stashes mean the same weights."""
    rule = {"delay": 0, "shrink": 0.5}
    models = []
    for stash in ("exact", "replay"):
        case = zoo.plain_mlp()
        groups, batches = chain_groups(case, K), batches_of(case)
        by_hand, losses = reference_by_hand.train(
            case.model,
            groups,
            batches,
            learning_rate=0.05,
            momentum=0.9,
            **rule,
        )
        result = reference_segments.train(
            case.model,
            groups,
            batches,
            case.loss,
            keras.optimizers.SGD(0.05, momentum=0.9),
            stash=stash,
            **rule,
        )
        np.testing.assert_allclose(result.losses[0], losses, rtol=1e-5)
        for found, expected in zip(by_hand, case.model.get_weights()):
            assert relative_error(found, expected) <= TOLERANCE
        models.append(case.model)
    assert_same_weights(*models)


def test_with_delay_the_stashes_differ():
    """Else the tests of the other stashes would show nothing."""
    trained = []
    for stash in ("exact", "replay", "current"):
        case = zoo.plain_mlp()
        groups, batches = chain_groups(case, 4), batches_of(case)
        if stash == "current":
            weights, _ = reference_by_hand.train(
                case.model, groups, batches, learning_rate=0.05, momentum=0.9
            )
        else:
            optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
            reference_segments.train(
                case.model, groups, batches, case.loss, optimizer, stash=stash
            )
            weights = case.model.get_weights()
        trained.append(weights[0])
    for a, b in itertools.combinations(trained, 2):
        assert relative_error(a, b) > 100 * TOLERANCE


def test_schedule_of_the_paper():
    """The timeline of K=3, delay=2; each row is one tick of all stages."""
    ticks = []
    reference_segments.run_schedule(
        3,
        5,
        2,
        "forward_first",
        lambda t: ticks.append([f"F{t}"]),
        lambda k, b: ticks[-1].append(f"{k}:B{b}"),
    )
    drain = ["1:B3", "1:B4", "0:B1", "0:B2", "0:B3", "0:B4"]
    assert ticks == [
        ["F0", "2:B0"],
        ["F1", "2:B1"],
        ["F2", "2:B2", "1:B0"],
        ["F3", "2:B3", "1:B1"],
        ["F4", "2:B4", "1:B2", "0:B0", *drain],
    ]
