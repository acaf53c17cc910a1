"""A run by a recipe: its learning rates, and what survives in its folder."""

import csv
import dataclasses
import json
import os
import pathlib

import keras
import pytest
from matching import assert_identical_weights

import fdg_keras
from trainers import datasets, models, recipes, run_folder, runs
from trainers.layers import relu
from trainers.recipes import Recipe
from trainers.runs import Run


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        (
            Recipe(),
            {
                **{0: 0.1, 149: 0.1, 150: 0.01, 224: 0.01},
                **{225: 0.001, 274: 0.001, 275: 0.0001, 299: 0.0001},
            },
        ),
        (
            Recipe(warmup_epochs=3),
            {0: 0.01, 2: 0.01, 3: 0.1, 150: 0.01},
        ),
        # In proportion, rounded down.
        (
            Recipe(train_epochs=10),
            {0: 0.1, 4: 0.1, 5: 0.01, 6: 0.01, 7: 0.001, 8: 0.001, 9: 0.0001},
        ),
        (Recipe(train_epochs=1), {0: 0.1}),
        (
            Recipe(train_epochs=10, lr_boundaries=(2,), learning_rate=1.0),
            {0: 1.0, 1: 1.0, 2: 0.1, 9: 0.1},
        ),
        (Recipe(lr_boundaries=()), {0: 0.1, 299: 0.1}),
    ],
)
def test_learning_rates(recipe, rates):
    found = {epoch: recipes.learning_rate(recipe, epoch) for epoch in rates}
    assert found == pytest.approx(rates)


def tiny(make, x):
    """Returns the features of a network that compiles in no time."""
    for i in range(3):
        x = relu(make.conv_norm(x, 4, 3, 1, f"block{i}_conv"), f"block{i}")
    return x


RECIPE = Recipe(
    dataset="digits",
    model="tiny",
    train_epochs=3,
    lr_boundaries=(1, 2),
    batch_size=16,
    limit=40,
)


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    with pytest.MonkeyPatch.context() as patch:
        network = models.Network(tiny, (8, 8, 1))
        patch.setitem(models.NETWORKS, "tiny", network)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    datasets.load("digits", 16, data_dir=folder)
    return folder


@pytest.fixture
def run(tmp_path, data_dir, cpus):
    """Makes runs in one folder."""

    def make(recipe=RECIPE, folder="run", **arguments):
        return Run(
            recipe,
            tmp_path / folder,
            data_dir=data_dir,
            devices=cpus[:3],
            **arguments,
        )

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_network, data_dir, cpus):
    """A run that nothing interrupts, and its result."""
    keras.utils.clear_session(free_memory=False)
    folder = tmp_path_factory.mktemp("whole")
    run = Run(RECIPE, folder, data_dir=data_dir, devices=cpus[:2])
    return run, run.train(verbose=0)


def assert_same(model, other):
    assert_identical_weights(model, other)
    assert_identical_weights(model.optimizer, other.optimizer)


def without_times(rows):
    return [{**row, "train_seconds": None} for row in rows]


class Killed(BaseException):
    """What the test raises where a process may be killed."""


def die_at(monkeypatch, name):
    """Lets a run die just before it puts a file in its place."""
    replace = os.replace

    def replace_or_die(new, path):
        if pathlib.Path(path).name == name:
            raise Killed(name)
        replace(new, path)

    monkeypatch.setattr(run_folder.os, "replace", replace_or_die)


def test_a_run_leaves_its_folder(run, tmp_path):
    first = run()
    result = first.train(verbose=0)
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-0003.keras",
        "config.json",
        "history.csv",
        "logs",
        "model.keras",
    ]
    assert list((folder / "logs").rglob("events.out.tfevents.*"))
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(
        [0.1, 0.01, 0.001]
    )
    assert float(rows[-1]["train_seconds"]) > 0
    accuracy = float(rows[-1]["val_accuracy"])
    assert result["test_error"] == pytest.approx(100 - 100 * accuracy)
    assert result["history"][-1]["val_accuracy"] == accuracy
    (config,) = json.loads((folder / "config.json").read_text())
    assert config["settings"]["model"] == "tiny"
    assert config["settings"]["limit"] == 40
    assert config["versions"]["keras"] == keras.__version__
    assert_same(models.load(result["model"]), first.trainer.model)


# A run puts its configuration, then for each epoch figures and a checkpoint.
@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("history.csv", 0),
        ("checkpoint-0001.keras", 0),
        ("checkpoint-0002.keras", 1),
        ("model.keras", 3),
    ],
)
def test_killed_and_resumed(run, whole, monkeypatch, name, epochs):
    with monkeypatch.context() as patch:
        die_at(patch, name)
        with pytest.raises(Killed, match=name):
            run().train(verbose=0)
    resumed = run(resume=True)
    assert resumed.first_epoch == epochs
    found = resumed.train(verbose=0)
    uninterrupted, expected = whole
    assert_same(resumed.trainer.model, uninterrupted.trainer.model)
    assert without_times(found["history"]) == without_times(expected["history"])
    assert found["test_error"] == expected["test_error"]


def test_resumed_in_another_number_of_stages(run, data_dir, cpus):
    """As if the stages had been changed after an epoch, in one process."""
    one = dataclasses.replace(RECIPE, train_epochs=1)
    first = run(one)
    first.train(verbose=0)
    now = dataclasses.replace(RECIPE, splits=3)
    resumed = run(now, resume=True)
    assert len(resumed.trainer.plan.stages) == 3
    resumed.train(verbose=0)

    model = first.trainer.model
    trainer = fdg_keras.Trainer(model, splits=3, devices=cpus[:3])
    data = datasets.load("digits", 16, 0, data_dir, limit=40)
    trainer.fit(
        data.training(1, 3),
        initial_epoch=1,
        epochs=3,
        steps_per_epoch=3,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(
                lambda epoch, _: (0.1, 0.01, 0.001)[epoch]
            )
        ],
    )
    assert_same(resumed.trainer.model, model)


def test_back_propagation_does_not_depend_on_the_stages(run, monkeypatch):
    """Resumed in three stages: what two would have given, to the bit."""
    recipe = dataclasses.replace(RECIPE, delay=0)
    two = run(recipe, folder="two")
    two.train(verbose=0)
    with monkeypatch.context() as patch:
        die_at(patch, "checkpoint-0002.keras")
        with pytest.raises(Killed, match="0002"):
            run(recipe).train(verbose=0)
    resumed = run(dataclasses.replace(recipe, splits=3), resume=True)
    resumed.train(verbose=0)
    assert_same(resumed.trainer.model, two.trainer.model)


def test_a_folder_is_not_written_over(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(ValueError, match=r"--resume.*Received: --model_dir="):
        run()


def test_what_must_not_change(whole, data_dir):
    _, result = whole
    changed = dataclasses.replace(RECIPE, batch_size=8, weight_decay=0.5)
    with pytest.raises(
        ValueError,
        match=r"Received: batch_size=8 \(was 16\), weight_decay=0.5 \(was",
    ):
        Run(changed, result["model"].parent, resume=True, data_dir=data_dir)


@pytest.mark.parametrize(
    ("optimizer", "kind", "decay", "penalties"),
    [
        ("sgd", keras.optimizers.SGD, None, True),
        ("adam", keras.optimizers.Adam, None, True),
        ("adamw", keras.optimizers.AdamW, 5e-4, False),
    ],
)
def test_optimizers(run, optimizer, kind, decay, penalties):
    made = run(dataclasses.replace(RECIPE, optimizer=optimizer)).trainer.model
    assert type(made.optimizer) is kind
    assert made.optimizer.weight_decay == decay
    assert bool(made.losses) == penalties


def test_mixed_precision(run):
    recipe = dataclasses.replace(RECIPE, dtype="bfloat16", train_epochs=1)
    mixed = run(recipe)
    assert keras.config.dtype_policy().name == "float32"
    assert mixed.trainer.model.get_layer("block1").compute_dtype == "bfloat16"
    assert mixed.train(verbose=0)["history"][0]["loss"] < 10


def test_corrections():
    recipe = Recipe(
        corrections=(
            "weight_prediction",
            "delay_compensation",
            "lr_rescheduling",
        )
    )
    prediction, compensation, rescheduling = runs._corrections(recipe, 391)
    assert isinstance(prediction, fdg_keras.WeightPrediction)
    assert isinstance(compensation, fdg_keras.DelayCompensation)
    assert rescheduling.steps == 150 * 391 / 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimizer": "lamb"}, "optimizer.*Received: 'lamb'"),
        ({"dtype": "int8"}, "dtype.*Received: 'int8'"),
        ({"corrections": ("magic",)}, "corrections.*Received: 'magic'"),
        ({"model": "vgg"}, "model.*Received: 'vgg'"),
        ({"dataset": "svhn"}, "dataset.*Received: 'svhn'"),
        ({"shrink": 7.0}, "shrink.*Received: 7.0"),
        ({"learning_rate": float("nan")}, "learning_rate.*Received: nan"),
        ({"delay": -1}, "delay.*Received: -1"),
        ({"splits": 0}, "splits.*Received: 0"),
        ({"splits": 99}, "99"),
    ],
)
def test_bad_settings_leave_nothing_behind(run, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(RECIPE, **setting))
    assert not (tmp_path / "run").exists()
