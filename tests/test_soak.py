"""20,000 ticks: memory stays flat, and nothing is traced again."""

import gc

import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf

import fdg_keras

EPOCHS, STEPS = 40, 500


class CountingDense(keras.layers.Dense):
    """Counts how often Python runs it: that is, how often it is traced."""

    traces = 0

    def call(self, x):
        CountingDense.traces += 1
        return super().call(x)


class Watch(keras.callbacks.Callback):
    """Memory in bytes, and traces so far, at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.memory, self.traces = [], []

    def on_epoch_end(self, epoch, logs=None):
        gc.collect()
        self.memory.append(psutil.Process().memory_info().rss)
        self.traces.append(CountingDense.traces)


@pytest.mark.parametrize("stash", ["exact", "replay"])
def test_memory_and_traces(stash):
    model = keras.Sequential([keras.Input((16,))])
    for _ in range(3):
        model.add(CountingDense(16, "relu"))
        model.add(keras.layers.Dropout(0.1))
    model.add(keras.layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, metrics=["accuracy"])
    random = np.random.RandomState(0)
    pair = random.rand(8, 16).astype("float32"), random.randint(0, 10, 8)
    epochs = EPOCHS if stash == "exact" else EPOCHS // 10
    watch = Watch()
    history = fdg_keras.fit(
        model,
        tf.data.Dataset.from_tensors(pair).repeat(),
        steps_per_epoch=STEPS,
        epochs=epochs,
        splits=2,
        stash=stash,
        shuffle=None,
        verbose=0,
        callbacks=[watch],
        validation_data=pair,
    )
    assert len(history.epoch) == epochs
    assert int(model.optimizer.iterations) == epochs * STEPS
    assert len(set(watch.traces)) == 1
    settled = watch.memory[len(watch.memory) // 4 :]
    assert max(settled) - min(settled) < 30 * 2**20, [
        m / 2**20 for m in watch.memory
    ]


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
