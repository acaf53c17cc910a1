"""Corrections for staleness, against the reference and by hand."""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
import zoo
from grid import ORDERS, pairwise
from matching import assert_identical_weights, assert_same_weights

import fdg_keras
from fdg_keras.corrections import (
    Correction,
    DelayCompensation,
    LearningRateRescheduling,
    WeightPrediction,
)


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def adam():
    return keras.optimizers.Adam(0.01)


def train(name, optimizer, corrections, epochs=2, splits=3, **settings):
    """Trains a case of the zoo; returns it and its stages' layers."""
    case = zoo.ZOO[name]()
    case.model.compile(optimizer, case.loss)
    trainer = fdg_keras.Trainer(
        case.model, case.cuts[splits], corrections=corrections, **settings
    )
    trainer.fit(
        case.x,
        case.y,
        batch_size=zoo.BATCH_SIZE,
        shuffle=False,
        verbose=0,
        epochs=epochs,
    )
    return case, [stage.layers for stage in trainer.plan.stages]


def refer(name, groups, optimizer, **settings):
    case = zoo.ZOO[name]()
    batches = reference.split_batches(zoo.BATCH_SIZE, case.x, case.y)
    reference.train(
        case.model, groups, batches, case.loss, optimizer, **settings
    )
    return case


CORRECTIONS = {
    "prediction": ([WeightPrediction()], {"predict": True}),
    "compensation": ([DelayCompensation(3.0)], {"compensate": 3.0}),
    "rescheduling": ([LearningRateRescheduling(15)], {"reschedule": 15}),
    "all": (
        [
            WeightPrediction(),
            DelayCompensation(0.5),
            LearningRateRescheduling(30),
        ],
        {"predict": True, "compensate": 0.5, "reschedule": 30},
    ),
}


@pytest.mark.filterwarnings("ignore:Adam divides gradients")
@pytest.mark.parametrize(
    ("kind", "make", "order"),
    pairwise(list(CORRECTIONS), [sgd, adam], ORDERS),
)
def test_mlp_equals_the_reference(kind, make, order):
    corrections, expected = CORRECTIONS[kind]
    found, groups = train("mlp", make(), corrections, order=order, shrink=0.5)
    wanted = refer(
        "mlp", groups, make(), epochs=2, order=order, shrink=0.5, **expected
    )
    assert_same_weights(found.model, wanted.model)
    plain, _ = train("mlp", make(), [], order=order, shrink=0.5)
    with pytest.raises(AssertionError, match="is off by"):
        assert_same_weights(found.model, plain.model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    ],
    ids=["nesterov", "adamw"],
)
def test_prediction_by_other_kinds_of_momentum(make):
    found, groups = train("mlp", make(), [WeightPrediction()])
    wanted = refer("mlp", groups, make(), epochs=2, predict=True)
    assert_same_weights(found.model, wanted.model)


@pytest.mark.parametrize(
    ("kind", "name", "splits"),
    [
        ("prediction", "conv", 3),
        ("compensation", "unet", 4),
        ("all", "lstm", 2),
    ],
)
def test_models_equal_the_reference(kind, name, splits):
    corrections, expected = CORRECTIONS[kind]
    found, groups = train(name, sgd(), corrections, 1, splits)
    wanted = refer(name, groups, sgd(), **expected)
    assert_same_weights(found.model, wanted.model)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_without_delay_nothing_is_corrected(kind):
    corrections, _ = CORRECTIONS[kind]
    found, _ = train("mlp", sgd(), corrections, delay=0)
    plain, _ = train("mlp", sgd(), [], delay=0)
    assert_identical_weights(found.model, plain.model)


def test_two_runs_are_bit_identical():
    corrections, _ = CORRECTIONS["all"]
    runs = [train("attention", adam(), corrections)[0] for _ in range(2)]
    assert_identical_weights(*(run.model for run in runs))


def test_a_schedule_is_rescheduled():
    """`lr / tau ** (1 - t / T)`, by hand: one weight whose gradient is 1."""
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(
                1, use_bias=False, kernel_initializer="zeros", name="one"
            ),
            keras.layers.Dense(
                1,
                use_bias=False,
                kernel_initializer="ones",
                trainable=False,
                name="two",
            ),
        ]
    )
    rate = keras.optimizers.schedules.PolynomialDecay(0.8, 8, 0.0)
    model.compile(
        keras.optimizers.SGD(rate), loss=lambda y, p: keras.ops.mean(p)
    )
    fdg_keras.fit(
        model,
        np.ones((8, 1)),
        np.ones((8, 1)),
        batch_size=1,
        verbose=0,
        splits=["one"],
        corrections=[LearningRateRescheduling(4)],
    )
    steps = np.arange(8)
    rates = 0.8 * (1 - steps / 8) * 2.0 ** -(1 - np.minimum(steps / 4, 1))
    kernel = model.get_layer("one").get_weights()[0]
    np.testing.assert_allclose(kernel, [[-rates.sum()]], rtol=1e-6)


def test_a_correction_of_ones_own():
    """Half the gradient in all stages but the last: as by shrinking."""

    class Halve(Correction):
        def gradients(self, gradients, now, then):
            return [g / 2 for g in gradients]

    # The two differ where a stage has losses of its own; these have none.
    found, _ = train("raw_operations", sgd(), [Halve()], splits=2)
    wanted, _ = train("raw_operations", sgd(), [], splits=2, shrink=0.5)
    assert_same_weights(found.model, wanted.model)


def test_sparse_gradients_are_compensated():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(5, 4, name="embedding"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(1, name="head"),
        ]
    )
    x = np.random.RandomState(0).randint(0, 5, (40, 3))
    y = np.random.RandomState(1).rand(40, 1).astype("float32")
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    loss = keras.losses.MeanSquaredError()
    model.compile(sgd(), loss)
    trainer = fdg_keras.Trainer(
        model, ["embedding"], corrections=[DelayCompensation(2.0)]
    )
    trainer.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    reference.train(
        twin,
        [stage.layers for stage in trainer.plan.stages],
        reference.split_batches(4, x, y),
        loss,
        sgd(),
        compensate=2.0,
    )
    assert_same_weights(model, twin)


# -- Bad input ----------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, float("nan"), "1", None, True])
@pytest.mark.parametrize("kind", [DelayCompensation, LearningRateRescheduling])
def test_numbers(kind, value):
    with pytest.raises(ValueError, match="to be a finite number of at least 0"):
        kind(value)


def test_no_steps():
    with pytest.raises(ValueError, match="above 0"):
        LearningRateRescheduling(0)


def compiled(optimizer):
    case = zoo.ZOO["mlp"]()
    case.model.compile(optimizer, case.loss)
    return case.model


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1),
        lambda: keras.optimizers.Adam(0.1, amsgrad=True),
        lambda: keras.optimizers.RMSprop(0.1),
    ],
)
def test_nothing_to_predict_by(optimizer):
    with pytest.raises(ValueError, match="needs a momentum to predict by"):
        fdg_keras.Trainer(
            compiled(optimizer()), 2, corrections=[WeightPrediction()]
        )


@pytest.mark.parametrize(
    "correction", [WeightPrediction(), LearningRateRescheduling(10)]
)
def test_updates_of_several_batches(correction):
    optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="without `gradient_accumulation"):
        fdg_keras.Trainer(compiled(optimizer), 2, corrections=[correction])


@pytest.mark.parametrize("stash", ["current", "replay"])
def test_other_stashes(stash):
    with pytest.raises(ValueError, match='only `stash="exact"` and `"sel'):
        fdg_keras.Trainer(
            compiled(sgd()), 2, stash=stash, corrections=[WeightPrediction()]
        )


def test_selective_keeps_the_weights_of_the_forward():
    corrections, _ = CORRECTIONS["all"]
    found, _ = train("conv", sgd(), corrections, epochs=1, stash="selective")
    wanted, _ = train("conv", sgd(), corrections, epochs=1)
    assert_same_weights(found.model, wanted.model)


@pytest.mark.parametrize("correction", ["prediction", WeightPrediction, 0.5])
def test_what_is_no_correction(correction):
    with pytest.raises(ValueError, match="Expected `corrections` to be a list"):
        fdg_keras.Trainer(compiled(sgd()), 2, corrections=[correction])


def test_one_correction_may_stand_alone():
    alone, _ = train("mlp", sgd(), WeightPrediction(), epochs=1)
    listed, _ = train("mlp", sgd(), [WeightPrediction()], epochs=1)
    assert_identical_weights(alone.model, listed.model)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_they_say_what_they_are(kind):
    corrections, _ = CORRECTIONS[kind]
    for correction in corrections:
        assert repr(correction).startswith(type(correction).__name__ + "(")


def test_the_base_class_changes_nothing():
    one = Correction()
    tensors = [tf.constant([1.0, 2.0])]
    assert one.weights(tensors, [], sgd(), tf.constant(2)) is tensors
    assert one.gradients(tensors, tensors, []) is tensors
    assert one.rate(tf.constant(3), 2) == 1.0
