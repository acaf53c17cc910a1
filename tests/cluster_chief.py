"""A chief, run by the tests of clusters as a process of its own.

    python cluster_chief.py JOB ADDRESSES [SETTINGS AS JSON]

It prints one JSON object for each thing it has to say.
"""

import faulthandler
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf

import fdg_keras
from fdg_keras import watch

BATCHES, BATCH, EPOCHS = 6, 8, 4
X = np.random.RandomState(0).rand(BATCHES * BATCH - 3, 6).astype("float32")
Y = np.random.RandomState(1).randint(0, 3, len(X))


def make_model(dropout=0.0):
    keras.utils.set_random_seed(4)
    layers = [keras.layers.Dense(8, "tanh") for _ in range(4)]
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers[0],
            keras.layers.BatchNormalization(),
            layers[1],
            keras.layers.Dropout(dropout),
            *layers[2:],
            keras.layers.Dense(3),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def data_set(device):
    """Data that are made where they are read."""
    with tf.device(device):
        indices = tf.data.Dataset.range(20).shuffle(20, seed=3)
        return indices.map(
            lambda i: (
                tf.random.stateless_normal([6], tf.stack([i, 0])),
                tf.cast(i % 3, tf.int32),
            )
        ).batch(BATCH)


def fit(model, devices, callbacks=(), **arguments):
    return fdg_keras.fit(
        model,
        X,
        Y,
        devices=devices,
        batch_size=BATCH,
        callbacks=list(callbacks),
        **{
            "splits": len(devices),
            "verbose": 0,
            "shuffle": False,
            "epochs": EPOCHS,
            **arguments,
        },
    )


def values(model):
    """The weights and slots of a model, in an order."""
    variables = [*model.weights, *model.optimizer.variables]
    return [np.asarray(variable) for variable in variables]


def say(**what):
    print(json.dumps(what), flush=True)


class Fault(keras.callbacks.Callback):
    """Runs a shell command after a batch.

    Args:
        command: In which `$CHIEF` is this process.
        epoch: When.
        batch: When.
    """

    drain_every = None

    def __init__(self, command, epoch, batch):
        super().__init__()
        self._command, self._at = command, (epoch, batch)
        self.time = None

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self._epoch, batch) == self._at:
            self.time = time.monotonic()
            environment = {**os.environ, "CHIEF": str(os.getpid())}
            subprocess.run(self._command, shell=True, env=environment)


# -- What a chief may have to do -----------------------------------------------


def train(devices, settings):
    """Trains, with a fault perhaps; tells how that ends."""
    model = make_model()
    callbacks = []
    if "backup" in settings:
        callbacks.append(keras.callbacks.BackupAndRestore(settings["backup"]))
    fault = None
    if "fault" in settings:
        fault = Fault(*settings["fault"])
        callbacks.append(fault)
    told = {"error": None, "epochs": None}
    try:
        told["epochs"] = fit(model, devices, callbacks).epoch
    except BaseException as error:
        told["error"] = type(error).__name__
        told["message"] = str(error)
        told["notes"] = getattr(error, "__notes__", [])
    if fault is not None and fault.time is not None:
        told["seconds"] = time.monotonic() - fault.time
    told["threads"] = [thread.name for thread in threading.enumerate()]
    say(**told)
    np.savez(settings["into"], *values(model))


def between(devices, settings):
    """Has a fault come while the model is at home; tells what works then."""
    model = make_model()
    trainer = fdg_keras.Trainer(model, 2, devices)
    trainer.fit(X, Y, BATCH, verbose=0, shuffle=False)
    subprocess.run(settings["command"], shell=True)
    errors, begun = [], time.monotonic()
    for call in (
        lambda: trainer.evaluate(X, Y, verbose=0),
        lambda: trainer.fit(X, Y, verbose=0),
        lambda: trainer.predict(X, verbose=0),
        lambda: fit(model, ["CPU:0"] * 2),
    ):
        try:
            call()
        except BaseException as error:
            errors.append([type(error).__name__, str(error)])
    say(
        errors=errors,
        seconds=time.monotonic() - begun,
        threads=[thread.name for thread in threading.enumerate()],
    )
    model.save(settings["into"])


class Command(keras.layers.Layer):
    """Runs a shell command when it is next traced."""

    command = None
    time = None

    def call(self, inputs):
        if self.command is not None:
            subprocess.run(self.command, shell=True)
            self.command, self.time = None, time.monotonic()
        return inputs


def tracing(devices, settings):
    """Has a fault come while TensorFlow is about to tell of new functions."""
    layer = Command()
    model = keras.Sequential([*make_model().layers[:2], layer])
    model.add(keras.layers.Dense(3))
    model.compile("sgd", "sparse_categorical_crossentropy")
    layer.command = settings["command"]
    try:
        model.fit(X, Y, verbose=0)  # Keras' own, without stages
    except Exception as error:
        told = {"error": type(error).__name__, "message": str(error)}
    say(
        **told,
        seconds=time.monotonic() - layer.time,
        threads=[thread.name for thread in threading.enumerate()],
    )


def compare(devices, settings):
    """Does all that is done with a model, here and over the cluster."""
    folder = pathlib.Path(settings["folder"])
    for count in range(2, len(devices) + 1):
        models = [make_model(dropout=0.2) for _ in range(2)]
        places = [devices[:count], ["CPU:0"] * count]
        histories = [
            fit(model, place, epochs=2).history
            for model, place in zip(models, places)
        ]
        here, there = (values(model) for model in models)
        say(
            stages=count,
            histories=histories[0] == histories[1],
            weights=all((a == b).all() for a, b in zip(here, there)),
        )
    read = []
    for place, host in ((devices[:2], devices[0]), (["CPU:0"] * 2, "CPU:0")):
        model, data = make_model(), data_set(host)
        trainer = fdg_keras.Trainer(model, 2, place)
        history = trainer.fit(data, validation_data=data, epochs=2, verbose=0)
        iterators = [
            list(built.pipeline.feed._loops)
            for built in trainer._deployment._built.values()
        ]
        read.append((iterators, history.history, values(model)))
    say(
        read_on=read[0][0],
        histories=read[0][1] == read[1][1],
        weights=all((a == b).all() for a, b in zip(read[0][2], read[1][2])),
    )
    remote, local = (
        fdg_keras.Trainer(make_model(), 3, place)
        for place in (devices[:3], ["CPU:0"] * 3)
    )
    monitor = fdg_keras.callbacks.PipelineMonitor(folder / "logs")
    saving = keras.callbacks.ModelCheckpoint(str(folder / "at.keras"))
    for trainer, callbacks in ((remote, [monitor, saving]), (local, [])):
        trainer.fit(
            *(X, Y, BATCH, 2),
            verbose=0,
            shuffle=False,
            validation_data=(X, Y),
            callbacks=callbacks,
        )
    loaded = keras.models.load_model(folder / "at.keras")
    plan = fdg_keras.plan(
        make_model(), 2, BATCH, devices[:2], cache_dir=folder / "plans"
    )
    fit(make_model(), devices[:2], splits=plan)
    run = json.loads((folder / "logs" / "pipeline.json").read_text())
    say(
        evaluate=[t.evaluate(X, Y, BATCH, verbose=0) for t in (remote, local)],
        predict=bool(
            (
                remote.predict(X, BATCH, verbose=0)
                == local.predict(X, BATCH, verbose=0)
            ).all()
        ),
        checkpoint=all(
            (a == b).all() for a, b in zip(values(loaded), values(local.model))
        ),
        planned=[
            [stage.device, stage.forward_s, stage.backward_s]
            for stage in plan.stages
        ],
        passes=[len(passes) for passes in run["passes"]],
        home=sorted({w.value.device for w in remote.model.weights}),
    )


def waiting(devices, settings):
    """Waits on one worker for what never comes, while another is lost."""
    with tf.device(devices[0]):
        empty = tf.queue.FIFOQueue(1, tf.float32)

    @tf.function
    def wait():
        with tf.device(devices[0]):
            return empty.dequeue()

    wait.get_concrete_function()
    try:
        with watch.Watch(devices):
            subprocess.run(settings["command"], shell=True)
            begun = time.monotonic()
            wait()
    except Exception as error:
        told = {"error": type(error).__name__, "message": str(error)}
    say(
        **told,
        seconds=time.monotonic() - begun,
        threads=[thread.name for thread in threading.enumerate()],
    )


def behind(devices, settings):
    """Trains with a clock that is behind; tells when passes were by it."""
    by_s = settings["by_s"]

    class Clock:
        time = staticmethod(lambda: time.time() - by_s)

    fdg_keras.clocks.time = Clock
    folder = pathlib.Path(settings["folder"])
    monitor = fdg_keras.callbacks.PipelineMonitor(folder)
    begun = Clock.time()
    fit(make_model(), devices, [monitor])
    ended = Clock.time()
    run = json.loads((folder / "pipeline.json").read_text())
    say(span=[begun, ended], passes=run["passes"])


def main():
    # One that hangs says where before it is killed.
    faulthandler.dump_traceback_later(190, exit=True)
    job, addresses = sys.argv[1:3]
    settings = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        devices = fdg_keras.connect_to_cluster(
            {"worker": addresses.split(",")}, settings.get("timeout_s", 30)
        )
    except Exception as error:
        say(error=type(error).__name__, message=str(error))
        return
    say(devices=devices)
    jobs = {
        "train": train,
        "compare": compare,
        "between": between,
        "tracing": tracing,
        "behind": behind,
        "waiting": waiting,
    }
    jobs[job](devices, settings)


if __name__ == "__main__":
    main()
