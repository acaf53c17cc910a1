"""The methods that FDG is compared with: what each of them computes."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from matching import assert_identical_weights

import fdg_keras
from trainers import datasets, local_losses, methods, models, recipes, runs
from trainers.layers import relu
from trainers.recipes import Recipe
from trainers.runs import Run


def tiny(make, x):
    """Returns the features of a network that compiles in no time."""
    for i in range(1, 4):
        x = relu(make.conv_norm(x, 4, 3, 1, f"block{i}_conv"), f"block{i}")
    return x


def plain(make, x):
    """Returns those of one whose examples know nothing of each other."""
    for i in range(1, 3):
        x = relu(make.conv(x, 4, 3, 1, f"block{i}_conv"), f"block{i}")
    return x


BASE = Recipe(
    dataset="digits",
    model="tiny",
    train_epochs=2,
    lr_boundaries=(1,),
    batch_size=16,
    limit=40,
)


def recipe_of(text, **changes):
    base = dataclasses.replace(BASE, **changes)
    return methods.parse([text], base, emulate=False)[0].recipe


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    for features in (tiny, plain):
        network = models.Network(features, (8, 8, 1))
        monkeypatch.setitem(models.NETWORKS, features.__name__, network)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    datasets.load("digits", 16, data_dir=folder)
    return folder


@pytest.fixture
def run(tmp_path, data_dir, cpus):
    def make(recipe, folder="run", devices=cpus[:3], **arguments):
        return Run(
            recipe,
            tmp_path / folder,
            data_dir=data_dir,
            devices=devices,
            **arguments,
        )

    return make


@pytest.fixture
def data(data_dir):
    return datasets.load("digits", 16, 0, data_dir, limit=40)


def model_of(run):
    return getattr(run.trainer, "model", run.trainer)


def build(recipe, data):
    """Returns the model of a run, as it begins."""
    return runs._build(recipe, data.description)


def fit(trained, batches):
    """Trains a model or a `Trainer` as a run of `BASE` does."""
    trained.fit(
        batches,
        epochs=BASE.train_epochs,
        steps_per_epoch=3,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(
                lambda epoch, _: recipes.learning_rate(BASE, epoch)
            )
        ],
    )


def assert_close(model, other):
    for a, b in zip(model.variables, other.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=a.path)


# -- Local losses -------------------------------------------------------------


def test_local_losses_are_back_propagation_in_each_stage(run, data):
    recipe = recipe_of("dgl:splits=3")
    in_stages = run(recipe)
    assert len(in_stages.trainer.plan.stages) == 3
    in_stages.train(verbose=0)
    expected = build(recipe, data)
    fit(expected, local_losses.with_labels(data.training(0, 2)))
    assert_close(model_of(in_stages), expected)
    # No stage waits for the one after it.
    for stage in in_stages.trainer.statistics:
        assert stage.usage.waited_gradients == 0


def test_no_gradient_crosses_a_cut(data):
    model = build(recipe_of("dgl:splits=2"), data)
    (cut,) = local_losses.cuts(model)
    images, labels = next(iter(data.training(0, 1)))
    with tf.GradientTape(persistent=True) as tape:
        logits = model([images, labels], training=True)
        (local,) = model.get_layer(cut).losses
        own = model.loss(labels, logits)

    def reached(loss):
        return {
            v.path
            for v in model.trainable_variables
            if tape.gradient(loss, v.value) is not None
        }

    layers = [layer.name for layer in model.layers]
    before = {
        v.path
        for layer in model.layers[: layers.index(cut)]
        for v in layer.trainable_variables
    }
    assert reached(local) == before
    assert f"{cut.removesuffix('_loss')}_logits/kernel" in before
    after = {v.path for v in model.trainable_variables} - before
    assert reached(own) == after
    assert "logits/kernel" in after


def test_local_losses_leave_the_network_as_it_is(run, data, tmp_path):
    trained = run(recipe_of("dgl:splits=3"))
    result = trained.train(verbose=0)
    # Loads without labels and heads, and has the error that was reported.
    network = models.load(result["model"])
    plain_one = models.build("tiny")
    assert [layer.name for layer in network.layers] == [
        layer.name for layer in plain_one.layers
    ]
    assert network.input_shape == (None, 8, 8, 1)
    images, labels = map(np.concatenate, zip(*data.test.as_numpy_iterator()))
    logits = network.predict(images, verbose=0)
    wrong = np.mean(np.argmax(logits, 1) != labels)
    assert result["test_error"] == pytest.approx(100 * wrong)
    # Whatever labels it is given.
    model = model_of(trained)
    same = model.predict([images, np.zeros_like(labels)], verbose=0)
    np.testing.assert_allclose(logits, same, rtol=1e-5, atol=1e-6)


def test_the_loss_when_testing_is_the_networks_own(data):
    recipe = recipe_of("dgl:splits=2", weight_decay=0.0)
    model = build(recipe, data)
    network = local_losses.remove(model)
    network.compile(loss=model.loss)
    losses = [
        tested.evaluate(batches, verbose=0, return_dict=True)["loss"]
        for tested, batches in (
            (model, local_losses.with_labels(data.test)),
            (network, data.test),
        )
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_local_losses_are_float32_in_mixed_precision(data):
    model = build(recipe_of("dgl:splits=2:dtype=bfloat16"), data)
    (cut,) = local_losses.cuts(model)
    batch = next(iter(local_losses.with_labels(data.training(0, 1))))
    model(batch[0], training=True)
    (loss,) = model.get_layer(cut).losses
    assert loss.dtype == tf.float32
    assert model.get_layer(cut).output.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("splits", "blocks"),
    [
        (1, []),
        (4, ["block1", "block2", "block3"]),
        (["block2"], ["block2"]),
    ],
)
def test_where_losses_are(splits, blocks):
    model = local_losses.add(models.build("tiny"), splits)
    assert local_losses.cuts(model) == [f"{name}_local_loss" for name in blocks]


@pytest.mark.parametrize("splits", [0, 5, ["block2_conv"]])
def test_losses_are_after_blocks(splits):
    with pytest.raises(
        ValueError, match=r"3 blocks block1, .*up to 4.*splits="
    ):
        local_losses.add(models.build("tiny"), splits)


# -- Accumulation, data parallelism -------------------------------------------


def test_local_losses_of_a_very_deep_network():
    """ResNet-1202 has more layers than Python allows calls in calls."""
    inputs = h = keras.Input((2, 2, 3))
    for i in range(1200):
        h = keras.layers.Activation("relu", name=f"block{i}")(h)
    pooled = keras.layers.GlobalAveragePooling2D()(h)
    logits = keras.layers.Dense(4, name="logits")(pooled)
    with models.deep_recursion():
        model = keras.Model(inputs, logits)
    wider = local_losses.add(model, ["block600"])
    assert local_losses.cuts(wider) == ["block600_local_loss"]
    again = local_losses.remove(wider)
    assert list(map(id, again.layers)) == list(map(id, model.layers))


def test_accumulation_is_that_of_the_optimizer(run, data, cpus):
    accumulated = run(recipe_of("adl:accumulate=2"))
    accumulated.train(verbose=0)
    model = build(recipe_of("fdg"), data)
    optimizer = keras.optimizers.SGD(
        momentum=0.9, gradient_accumulation_steps=2
    )
    model.compile(optimizer, model.loss)
    fit(fdg_keras.Trainer(model, 2, cpus[:2], delay=2), data.training(0, 2))
    assert_identical_weights(model_of(accumulated), model)


def test_data_parallel_is_back_propagation(run, data, cpus):
    """Without batch normalization, which sees a part of each batch only."""
    parallel = run(recipe_of("dp", model="plain"), devices=cpus[3:5])
    parallel.train(verbose=0)
    expected = build(recipe_of("bp", model="plain"), data)
    fit(expected, data.training(0, 2))
    assert_close(parallel.trainer, expected)
    (kernel,) = parallel.trainer.get_layer("block1_conv").variables
    devices = [replica.device for replica in kernel.value.values]
    assert [device[-len(cpus[3]) :] for device in devices] == cpus[3:5]


def test_data_parallel_needs_as_many_devices(run, tmp_path):
    for text in ("dp:splits=4", "dp:splits=block1"):
        with pytest.raises(ValueError, match=r"at most 3\. Received: splits="):
            run(recipe_of(text))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["dgl", "adl", "dp"])
def test_resumed_to_the_bit(run, text):
    recipe = recipe_of(text, model="plain")
    whole = run(recipe, folder="whole")
    whole.train(verbose=0)
    run(dataclasses.replace(recipe, train_epochs=1)).train(verbose=0)
    resumed = run(recipe, resume=True)
    assert resumed.first_epoch == 1
    resumed.train(verbose=0)
    assert_identical_weights(model_of(resumed), model_of(whole))
