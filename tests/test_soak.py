"""20,000 ticks: memory stays flat, and nothing is traced again."""

import gc

import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf

import fdg_keras

EPOCHS, STEPS = 40, 500

#: An activation is so large (128 KiB) that one left behind at each tick would
#: make gigabytes; and a version of a weight (8 KiB), which `"exact"` keeps,
#: more than the limit, too.
BATCH, WIDTH = 16, 2048
LIMIT = 30 * 2**20


class Counting(keras.layers.Layer):
    """Counts how often Python runs it: that is, how often it is traced.

    Its backward reads its input and its weight, and it is quick for its size.
    """

    traces = 0

    def build(self, shape):
        self.gain = self.add_weight(shape=shape[1:], initializer="ones")

    def call(self, x):
        Counting.traces += 1
        return keras.ops.relu(self.gain * x)


class CountingDense(keras.layers.Dense):
    """Counts how often Python runs it: that is, how often it is traced."""

    traces = 0

    def call(self, x):
        CountingDense.traces += 1
        return super().call(x)


class Watch(keras.callbacks.Callback):
    """Memory in bytes, and traces so far, at the end of each epoch.

    Pages of libraries are not counted: the system takes them away and brings
    them back as it likes.
    """

    def __init__(self):
        super().__init__()
        self.memory, self.traces = [], []

    def on_epoch_end(self, epoch, logs=None):
        gc.collect()
        memory = psutil.Process().memory_info()
        self.memory.append(memory.rss - memory.shared)
        self.traces.append(Counting.traces)


@pytest.mark.parametrize("stash", ["exact", "replay"])
def test_memory_and_traces(stash):
    model = keras.Sequential([keras.Input((WIDTH,))])
    for k in range(3):
        model.add(Counting())
        model.add(keras.layers.Dropout(0.1, name=f"end{k}"))
    model.add(keras.layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, metrics=["accuracy"])
    random = np.random.RandomState(0)
    x = random.rand(BATCH, WIDTH).astype("float32")
    pair = x, random.randint(0, 10, BATCH)
    epochs = EPOCHS if stash == "exact" else EPOCHS // 10
    # Left behind between the epochs that are compared.
    leak = STEPS * (epochs - epochs // 4 - 1) * x.nbytes
    assert leak > 4 * LIMIT
    watch = Watch()
    history = fdg_keras.fit(
        model,
        tf.data.Dataset.from_tensors(pair).repeat(),
        steps_per_epoch=STEPS,
        epochs=epochs,
        splits=["end0", "end1"],
        stash=stash,
        shuffle=None,
        verbose=0,
        callbacks=[watch],
        validation_data=pair,
    )
    assert len(history.epoch) == epochs
    assert int(model.optimizer.iterations) == epochs * STEPS
    assert len(set(watch.traces)) == 1
    # It may fall, where what other tests left behind is given back, but from
    # no epoch to any later one may it rise.
    settled = np.array(watch.memory[len(watch.memory) // 4 :])
    rise = settled - np.minimum.accumulate(settled)
    assert rise.max() < LIMIT, (settled / 2**20).tolist()


def test_many_fits_trace_once():
    model = keras.Sequential(
        [keras.Input((4,)), CountingDense(3), CountingDense(1)]
    )
    model.compile("sgd", "mse")
    trainer = fdg_keras.Trainer(model, 2)
    x, y = np.ones((10, 4), "float32"), np.ones((10, 1), "float32")
    trainer.fit(x, y, batch_size=4, verbose=0)
    trainer.evaluate(x, y, batch_size=4, verbose=0)
    trainer.predict(x, batch_size=4, verbose=0)
    before = CountingDense.traces
    for _ in range(5):
        trainer.fit(x, y, batch_size=4, verbose=0)
        trainer.evaluate(x, y, batch_size=4, verbose=0)
        trainer.predict(x, batch_size=4, verbose=0)
    assert CountingDense.traces == before
