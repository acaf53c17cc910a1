"""The library against the references, and against `model.fit`.

Weights, BatchNorm statistics and seeds after twelve batches, the last of them
short, must equal those of `reference.py` to 1e-5: for each tensor the largest
difference, divided by the tensor's largest entry (matching.py). Losses and
metrics in History, too.

By default the multilayer perceptron sees every pair of the values in `grid.py`
(say delay 3 with Adam), the four other standard models do so together, and the
models that are hard to slice see one setting each. With `FDG_FULL=1` in the
environment every model sees all settings that differ, 86 each: K in 1 to 4,
delay in 0 to 3, both orders, shrink 1 and 0.5, both optimizers. For the MLP and
the other standard models those are 430 tests, and take 26 minutes on two cores.
"""

import itertools
import math

import keras
import numpy as np
import pytest
import reference
import reference_by_hand
import reference_segments
import zoo
from grid import (
    FULL,
    OPTIMIZERS,
    ORDERS,
    SHRINKS,
    Setting,
    covering,
    distinct,
    pairwise,
)
from matching import (
    TOLERANCE,
    assert_identical_weights,
    assert_same_weights,
    errors,
    relative_error,
)

import fdg_keras

#: Beside the MLP, the kinds of model that people train.
STANDARD = ["conv", "lstm", "attention", "unet"]

#: Models that are there for their shape.
SHAPES = [name for name in zoo.ZOO if name not in ("mlp", *STANDARD)]

RULES = (ORDERS, SHRINKS, OPTIMIZERS)


def settings(*factors):
    """Pairs of a name and a setting, from `pairwise` of names, K, delay ..."""
    return [(name, Setting(*rest)) for name, *rest in pairwise(*factors)]


def make_trainer(case, K, optimizer, splits=None, **arguments):
    """A trainer of the case's model, cut at the case's cuts."""
    case.model.compile(optimizer, case.loss, metrics=case.metrics)
    if splits is None:
        splits = case.cuts[K] if K > 1 else 1
    trainer = fdg_keras.Trainer(case.model, splits=splits, **arguments)
    assert len(trainer.plan.stages) == K
    return trainer


def fit(fitted, case, **arguments):
    """`fit` of a trainer or of a model, over the case's data in order."""
    arguments = {
        "batch_size": zoo.BATCH_SIZE,
        "shuffle": False,
        "verbose": 0,
    } | arguments
    return fitted.fit(case.x, case.y, **arguments)


def groups_of(trainer):
    return [stage.layers for stage in trainer.plan.stages]


def batches_of(case, *sample_weight):
    return reference.split_batches(
        zoo.BATCH_SIZE, case.x, case.y, *sample_weight
    )


def refer(case, trainer, optimizer, *sample_weight, **arguments):
    """Trains the case's model by the reference, in the trainer's stages."""
    return reference.train(
        case.model,
        groups_of(trainer),
        batches_of(case, *sample_weight),
        case.loss,
        optimizer,
        **arguments,
    )


def divergence(build, setting):
    """The first number of batches after which the weights differ."""
    for n in range(1, len(batches_of(build())) + 1):
        case, expected = build(), build()
        for one in (case, expected):
            one.x, one.y = keras.tree.map_structure(
                lambda a, n=n: a[: n * zoo.BATCH_SIZE], (one.x, one.y)
            )
        optimizer = setting.make_optimizer()
        trainer = make_trainer(case, setting.K, optimizer, **setting.rule)
        fit(trainer, case)
        refer(expected, trainer, setting.make_optimizer(), **setting.rule)
        if not max(errors(case.model, expected.model)) <= TOLERANCE:
            return f"; diverged at step {n}"
    return ""


def check(name, setting):
    build = zoo.ZOO[name]
    case, expected = build(), build()
    optimizer = setting.make_optimizer()
    trainer = make_trainer(case, setting.K, optimizer, **setting.rule)
    history = fit(trainer, case)
    result = refer(expected, trainer, setting.make_optimizer(), **setting.rule)
    try:
        assert_same_weights(case.model, expected.model)
    except AssertionError as error:
        raise AssertionError(str(error) + divergence(build, setting)) from None
    np.testing.assert_allclose(
        history.history["loss"], result.epoch_losses, rtol=1e-5
    )


@pytest.mark.parametrize(
    "setting", distinct() if FULL else covering(distinct(), 2), ids=str
)
def test_mlp_equals_the_reference(setting):
    check("mlp", setting)


@pytest.mark.parametrize(
    ("name", "setting"),
    list(itertools.product(STANDARD + SHAPES, distinct()))
    if FULL
    else settings(STANDARD, (2, 3, 4), (1, 2, 3), *RULES)
    + [
        (name, Setting(*values))
        for name, values in zip(
            SHAPES, itertools.cycle(pairwise((3, 4), (1, 2), *RULES))
        )
    ],
    ids=str,
)
def test_models_equal_the_reference(name, setting):
    check(name, setting)


@pytest.mark.parametrize("name", ["unet", "nested", "shared"])
def test_automatic_cuts_equal_the_reference(name):
    case, expected = zoo.ZOO[name](), zoo.ZOO[name]()
    trainer = make_trainer(case, 3, _momentum(), splits=3)
    fit(trainer, case)
    refer(expected, trainer, _momentum())
    assert_same_weights(case.model, expected.model)


def _momentum():
    return keras.optimizers.SGD(0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("name", "K"),
    [(name, 1 + i % 4) for i, name in enumerate(zoo.ZOO)],
)
def test_without_delay_it_is_model_fit(name, K):
    """Weights, optimizer slots, and every number in History."""
    case, expected = zoo.ZOO[name](), zoo.ZOO[name]()
    trainer = make_trainer(case, K, keras.optimizers.Adam(0.01), delay=0)
    expected.model.compile(
        keras.optimizers.Adam(0.01), expected.loss, metrics=expected.metrics
    )
    more = {"epochs": 2, "validation_split": 0.25} if name == "mlp" else {}
    found = fit(trainer, case, **more)
    wanted = fit(expected.model, expected, **more)
    assert_same_weights(case.model, expected.model)
    assert_same_weights(case.model.optimizer, expected.model.optimizer)
    assert list(found.history) == list(wanted.history)
    for key, values in wanted.history.items():
        np.testing.assert_allclose(
            found.history[key], values, rtol=1e-5, err_msg=key
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5),
            momentum=0.9,
            nesterov=True,
        ),
        lambda: keras.optimizers.SGD(0.05, weight_decay=0.1),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: keras.optimizers.SGD(0.1, clipnorm=0.05),
        lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=3),
        lambda: keras.optimizers.RMSprop(0.003),
    ],
    ids=["schedule", "decay", "adamw", "clip", "accumulate", "rmsprop"],
)
def test_optimizers_equal_the_reference(make):
    case, expected = zoo.mlp(), zoo.mlp()
    trainer = make_trainer(case, 3, make(), shrink=0.5)
    fit(trainer, case)
    refer(expected, trainer, make(), shrink=0.5)
    assert_same_weights(case.model, expected.model)


def test_sample_weights_equal_the_reference():
    case, expected = zoo.mlp(), zoo.mlp()
    weights = np.random.RandomState(5).uniform(0.1, 2.0, zoo.SAMPLES)
    weights = weights.astype("float32")
    trainer = make_trainer(case, 3, _momentum())
    history = fit(trainer, case, sample_weight=weights)
    result = refer(expected, trainer, _momentum(), weights)
    assert_same_weights(case.model, expected.model)
    np.testing.assert_allclose(
        history.history["loss"], result.epoch_losses, rtol=1e-5
    )


@pytest.mark.parametrize("order", ORDERS)
def test_epochs_drain_and_validation_sees_the_drained_model(order):
    case, expected = zoo.conv(), zoo.conv()
    validation = (case.x[:20], case.y[:20])
    trainer = make_trainer(case, 3, _momentum(), order=order)
    history = fit(trainer, case, epochs=2, validation_data=validation).history

    expected.model.compile(loss=expected.loss, metrics=expected.metrics)
    logs = []
    result = refer(
        expected,
        trainer,
        _momentum(),
        order=order,
        epochs=2,
        on_epoch_end=lambda: logs.append(
            expected.model.evaluate(*validation, verbose=0, return_dict=True)
        ),
    )
    assert_same_weights(case.model, expected.model)
    accuracies = [
        np.mean(np.concatenate([o for (o,) in epoch]).argmax(-1) == case.y)
        for epoch in result.outputs
    ]
    wanted = {
        "accuracy": accuracies,
        "loss": result.epoch_losses,
        "val_accuracy": [log["accuracy"] for log in logs],
        "val_loss": [log["loss"] for log in logs],
    }
    assert sorted(history) == sorted(wanted)
    for key, values in wanted.items():
        np.testing.assert_allclose(history[key], values, rtol=1e-5, err_msg=key)


def test_two_fits_are_one_of_two_epochs():
    """The slots and the iterations, too, are where the first fit left them."""
    once, twice = zoo.mlp(), zoo.mlp()
    both = fit(
        make_trainer(once, 3, keras.optimizers.Adam(0.01)), once, epochs=2
    )
    trainer = make_trainer(twice, 3, keras.optimizers.Adam(0.01))
    parts = [fit(trainer, twice) for _ in range(2)]
    assert_identical_weights(twice.model, once.model)
    losses = [loss for part in parts for loss in part.history["loss"]]
    assert losses == both.history["loss"]


@pytest.mark.parametrize(
    ("name", "stash"),
    [
        ("mlp", "exact"),
        ("conv", "exact"),
        ("lstm", "exact"),
        ("attention", "exact"),
        ("attention", "selective"),
        ("attention", "current"),
        ("attention", "replay"),
    ],
)
def test_two_runs_are_bit_identical(name, stash):
    runs = []
    for _ in range(2):
        case = zoo.ZOO[name]()
        trainer = make_trainer(
            case, 3, keras.optimizers.Adam(0.01), stash=stash
        )
        history = fit(trainer, case, shuffle=True)
        runs.append((case.model, history.history))
    assert_identical_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize(
    "setting",
    [
        Setting(*values)
        for values in pairwise((2, 3, 4), (1, 2, 3), ORDERS, SHRINKS, ("sgd",))
    ],
    ids=str,
)
def test_current_equals_the_reference(setting):
    case = zoo.plain_mlp()
    optimizer = setting.make_optimizer()
    trainer = make_trainer(
        case, setting.K, optimizer, stash="current", **setting.rule
    )
    expected, losses = reference_by_hand.train(
        zoo.plain_mlp().model,
        groups_of(trainer),
        batches_of(case),
        learning_rate=0.05,
        momentum=0.9,
        **setting.rule,
    )
    history = fit(trainer, case)
    for variable, array in zip(case.model.variables, expected, strict=True):
        error = relative_error(variable.numpy(), array)
        assert error <= TOLERANCE, f"{variable.path} is off by {error:.2g}"
    sizes = [len(y) for _, y in batches_of(case)]
    np.testing.assert_allclose(
        history.history["loss"], np.average(losses, weights=sizes), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "setting"),
    settings(["mlp"], (2, 4), (1, 2), *RULES)
    + settings(["conv", "activity", "lstm"], [3], [2], ORDERS, [0.5], ["sgd"]),
    ids=str,
)
def test_replay_equals_the_reference(name, setting):
    case, expected = zoo.ZOO[name](), zoo.ZOO[name]()
    optimizer = setting.make_optimizer()
    trainer = make_trainer(
        case, setting.K, optimizer, stash="replay", **setting.rule
    )
    history = fit(trainer, case)
    result = reference_segments.train(
        expected.model,
        groups_of(trainer),
        batches_of(expected),
        expected.loss,
        setting.make_optimizer(),
        stash="replay",
        **setting.rule,
    )
    assert_same_weights(case.model, expected.model)
    np.testing.assert_allclose(
        history.history["loss"], result.epoch_losses, rtol=1e-5
    )


class Decaying(keras.callbacks.Callback):
    """Lowers the rate after each window; is content with weights in motion."""

    drain_every = None

    def on_train_batch_end(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.8 * float(
            self.model.optimizer.learning_rate
        )


@pytest.mark.parametrize(
    ("delay", "window", "order", "emulate"),
    pairwise((0, 1, 2), (1, 2, 5), ORDERS, (False, True)),
)
def test_rates_that_a_callback_sets(delay, window, order, emulate):
    """As documented: `ceil(d_0 / window) + 2` windows after the one it saw."""
    case, expected = zoo.mlp(), zoo.mlp()
    optimizer = keras.optimizers.SGD(0.2, momentum=0.9)
    case.model.compile(optimizer, case.loss, steps_per_execution=window)
    trainer = fdg_keras.Trainer(
        case.model, case.cuts[3], delay=delay, order=order, emulate=emulate
    )
    history = fit(trainer, case, epochs=2, callbacks=[Decaying()])
    d_0, n = 2 * delay, len(batches_of(case))
    ahead = math.ceil(d_0 / window) + 2 if delay else 1

    def rate(epoch, tick):
        ended = epoch * math.ceil(n / window)
        return 0.2 * 0.8 ** (ended + max(tick // window - ahead + 1, 0))

    result = refer(
        expected,
        trainer,
        optimizer,
        epochs=2,
        delay=delay,
        order=order,
        rates=rate,
    )
    assert_same_weights(case.model, expected.model)
    np.testing.assert_allclose(
        history.history["loss"], result.epoch_losses, rtol=1e-5
    )


def _selective(name):
    """Trains a case both ways; returns the models."""
    fitted = []
    for stash in ("exact", "selective"):
        case = zoo.ZOO[name]()
        trainer = make_trainer(case, 3, _momentum(), stash=stash, shrink=0.5)
        fit(trainer, case)
        fitted.append(case.model)
    return fitted


@pytest.mark.parametrize(
    "name", ["conv", "lstm", "attention", "unet", "two_inputs", "integers"]
)
def test_selective_equals_exact(name):
    """The same operations on the same numbers, but some of them twice."""
    assert_same_weights(*_selective(name))


def test_selective_equals_exact_in_mixed_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert_same_weights(*_selective("conv"))
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("name", "setting"),
    settings(["mlp", "attention"], (2, 4), (1, 2), *RULES),
    ids=str,
)
def test_selective_equals_the_reference(name, setting):
    case, expected = zoo.ZOO[name](), zoo.ZOO[name]()
    optimizer = setting.make_optimizer()
    trainer = make_trainer(
        case, setting.K, optimizer, stash="selective", **setting.rule
    )
    fit(trainer, case)
    refer(expected, trainer, setting.make_optimizer(), **setting.rule)
    assert_same_weights(case.model, expected.model)


@pytest.mark.parametrize(
    ("name", "stash"),
    [
        ("attention", "current"),
        ("conv", "selective"),
        ("conv", "current"),
        ("lstm", "current"),
        ("two_inputs", "replay"),
        ("unet", "replay"),
    ],
)
def test_without_delay_every_stash_is_model_fit(name, stash):
    """No update lies between forward and backward: all weights are today's."""
    case, expected = zoo.ZOO[name](), zoo.ZOO[name]()
    trainer = make_trainer(case, 3, _momentum(), delay=0, stash=stash)
    expected.model.compile(_momentum(), expected.loss)
    fit(trainer, case)
    fit(expected.model, expected)
    assert_same_weights(case.model, expected.model)


def test_shrinking_object_equals_the_number():
    models = []
    for shrink in (0.5, fdg_keras.GradientShrinking(0.5)):
        case = zoo.mlp()
        fit(make_trainer(case, 3, _momentum(), shrink=shrink), case)
        models.append(case.model)
    assert_identical_weights(*models)
