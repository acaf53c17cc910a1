"""What stages measure of themselves is right, and changes nothing."""

import keras
import numpy as np
import pytest
from keras import layers
from matching import assert_identical_weights
from reference_segments import run_schedule

import fdg_keras
from fdg_keras import delays, probes

K, WIDTHS, BATCH, RATE = 3, [5, 7, 6, 2], 4, 0.2


class Watch(keras.callbacks.Callback):
    """Keeps the statistics of each epoch."""

    probes = True

    def __init__(self):
        super().__init__()
        self.epochs = []

    def set_trainer(self, trainer):
        self.trainer = trainer or self.trainer

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self.trainer.statistics)


class Pausing(Watch):
    """Has the stages drain every ten batches."""

    drain_every = 10


def make_data(batches):
    random = np.random.RandomState(0)
    x = random.randn(batches * BATCH, WIDTHS[0]).astype("float32")
    return x, random.randn(len(x), WIDTHS[-1]).astype("float32")


def make_model(make_layer=layers.Dense):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((WIDTHS[0],))])
    for k, width in enumerate(WIDTHS[1:]):
        model.add(make_layer(width, "tanh", name=f"layer{k}"))
    model.compile(keras.optimizers.SGD(RATE), "mse")
    return model


def train(batches, callback=None, splits=K, epochs=1, model=None, **settings):
    """Returns a model, trained in stages."""
    model = model or make_model()
    fdg_keras.fit(
        model,
        *make_data(batches),
        splits=splits,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[callback] if callback else None,
        **settings,
    )
    return model


# -- Norms and drift -----------------------------------------------------------


class Stage:
    """A dense layer and tanh, by hand: `a = tanh(x W + b)`."""

    def __init__(self, layer, stash):
        self.weights = [v.numpy().astype("float64") for v in layer.variables]
        self.stash = stash
        self.kept = {}

    def forward(self, t, x):
        W, b = self.weights
        a = np.tanh(x @ W + b)
        self.kept[t] = x, a, self.weights
        return a

    def backward(self, b, da):
        """Updates; returns dx, and how far the weights had moved."""
        x, a, then = self.kept.pop(b)
        W = (then if self.stash == "exact" else self.weights)[0]
        dz = da * (1 - a**2)
        drift = norm(*(w - t for w, t in zip(self.weights, then))) / norm(*then)
        gradients = x.T @ dz, dz.sum(axis=0)
        self.weights = [w - RATE * g for w, g in zip(self.weights, gradients)]
        return dz @ W.T, drift


def norm(*arrays):
    return np.sqrt(sum((a**2).sum() for a in arrays))


def measure_by_hand(batches, stash, order, delay, shrink, every=16):
    """Returns `[k][name]`, means over one batch in `every`."""
    stages = [Stage(layer, stash) for layer in make_model().layers]
    x, y = (a.astype("float64") for a in make_data(batches))
    link, found = {}, [{} for _ in stages]

    def forward(t):
        rows = slice(t * BATCH, (t + 1) * BATCH)
        a = x[rows]
        for stage in stages:
            a = stage.forward(t, a)
        link[K - 1, t] = 2 * (a - y[rows]) / a.size

    def backward(k, b):
        gradient, late = link.pop((k, b)), k < K - 1
        seen = {}
        if late:
            seen["gradient_norm"] = norm(gradient)
            gradient = shrink * gradient
            seen["transformed_norm"] = norm(gradient)
        link[k - 1, b], seen["drift"] = stages[k].backward(b, gradient)
        if b % every == 0:
            for name, value in seen.items():
                found[k].setdefault(name, []).append(value)

    run_schedule(K, batches, delay, order, forward, backward)
    return [{n: np.mean(v) for n, v in one.items()} for one in found]


@pytest.mark.parametrize(
    ("stash", "order", "delay"),
    [
        ("exact", "forward_first", 2),
        ("exact", "update_first", 2),
        ("exact", "update_first", 1),
        ("exact", "forward_first", 0),
        ("current", "forward_first", 2),
        ("current", "update_first", 2),
    ],
)
def test_norms_and_drift(stash, order, delay):
    settings = {"stash": stash, "order": order, "delay": delay, "shrink": 0.5}
    watch = Watch()
    watched = train(37, watch, **settings)
    assert_identical_weights(watched, train(37, **settings))

    (stages,) = watch.epochs
    wanted = measure_by_hand(37, **settings)
    for one, values in zip(stages, wanted, strict=True):
        for name, value in values.items():
            # A difference of weights that hardly differ is all rounding.
            assert getattr(one, name) == pytest.approx(value, 1e-3, 1e-6), name
        assert one.staleness == delays.staleness(one.stage, K, delay, order)
        assert one.drift == 0 if one.staleness == 0 else one.drift > 1e-3
    for one in stages[:-1]:
        assert one.transformed_norm == pytest.approx(0.5 * one.gradient_norm)
    # Nothing arrives there.
    assert stages[-1].gradient_norm is stages[-1].transformed_norm is None
    assert stages[-1].gradients_waiting is None


def test_selective_measures_what_exact_does():
    found, wanted = Watch(), Watch()
    for watch, stash in ((found, "selective"), (wanted, "exact")):
        train(37, watch, stash=stash)
    for one, other in zip(found.epochs[0], wanted.epochs[0], strict=True):
        for name in ("drift", "gradient_norm", "staleness"):
            value = getattr(other, name)
            if value is not None:  # There is none in the last stage.
                value = pytest.approx(value, 1e-5)
            assert getattr(one, name) == value, name


def test_samples_are_fewer_the_later_a_stage_is():
    """Else the next sample's weights would take the place of the last's."""
    watch = Watch()
    train(70, watch, delay=10)
    (stages,) = watch.epochs
    for one, every in zip(stages, (32, 16, 16)):
        setting = ("exact", "forward_first", 10, 1.0, every)
        wanted = measure_by_hand(70, *setting)[one.stage]
        assert one.drift == pytest.approx(wanted["drift"], 1e-3, 1e-6)


# -- Links and passes ----------------------------------------------------------


@pytest.mark.parametrize("order", delays.ORDERS)
@pytest.mark.parametrize(
    ("batches", "delay", "splits"),
    [(50, 2, 3), (7, 2, 3), (3, 1, 2), (9, 2, 1)],
)
def test_links_and_passes(batches, delay, splits, order):
    watch = Watch()
    train(batches, watch, splits=splits, delay=delay, order=order, epochs=2)
    for stages in watch.epochs:
        check_links(stages)
        check_passes(stages, 0, batches, delay, order)


@pytest.mark.parametrize("batches", [25, 30, 7])
def test_passes_are_those_since_the_stages_drained(batches):
    watch = Pausing()
    train(batches, watch, epochs=2)
    first = (batches - 1) // 10 * 10
    for stages in watch.epochs:
        check_passes(stages, first, batches)
        assert [one.usage.ticks for one in stages] == [batches] * K


def check_links(stages):
    for one in stages:
        assert one.capacity >= 1
        if one.stage > 0:
            assert 0 <= one.activations_waiting <= one.capacity
        if one.gradients_waiting is not None:
            assert 0 <= one.gradients_waiting <= one.capacity


def check_passes(stages, first, stop, delay=2, order="forward_first"):
    """The right batches, in order, one after the other, none before its time.

    All stages drained before batch `first`, and after the one before `stop`.
    """
    ends = {}
    for one in stages:
        late = delays.stage_delay(one.stage, len(stages), delay)
        order_of_all = [
            work
            for row in delays.timeline(len(stages), delay, stop - first, order)
            for work in row[one.stage].split()
        ]
        order_of_all += [f"B{b}" for b in range(stop - first)[-late:] if late]
        kept = range(max(first, stop - probes.KEPT), stop)
        found = [f"{p.kind}{p.batch - first}" for p in one.passes]
        assert found == [
            work for work in order_of_all if int(work[1:]) + first in kept
        ]
        times = [t for p in one.passes for t in (p.waits, p.starts, p.ends)]
        assert times == sorted(times)
        ends |= {(p.kind, one.stage, p.batch): p for p in one.passes}
    for (kind, k, batch), one in ends.items():
        before = ends.get((kind, k - 1 if kind == "F" else k + 1, batch))
        if before is not None:
            # It sends before it has ended.
            assert before.starts <= one.starts


# -- Tracing -------------------------------------------------------------------


class CountingDense(layers.Dense):
    """Counts how often it is traced."""

    traces = 0

    def call(self, x):
        CountingDense.traces += 1
        return super().call(x)


def test_nothing_is_traced_again():
    trainer = fdg_keras.Trainer(make_model(CountingDense), K)
    x, y = make_data(5)
    found = []
    for callbacks in ([Watch()], [Watch()], None, [Watch()]):
        trainer.fit(x, y, BATCH, epochs=3, verbose=0, callbacks=callbacks)
        found.append(CountingDense.traces)
    assert len(set(found)) == 1


def test_probes_outlive_a_change_of_what_is_trainable():
    class Freeze(Watch):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            if epoch == 0:
                self.model.layers[0].trainable = False
                self.model.compile(keras.optimizers.SGD(RATE), "mse")

    watch = Freeze()
    train(5, watch, epochs=2)
    assert [len(stages[1].passes) for stages in watch.epochs] == [10, 10]
    assert watch.epochs[1][0].drift is None  # nothing to train


def test_nothing_is_measured_that_nobody_asked_for():
    trainer = fdg_keras.Trainer(make_model(), K)
    trainer.fit(*make_data(5), BATCH, verbose=0)
    for one in trainer.statistics:
        assert one.passes == ()
        assert one.drift is one.gradient_norm is one.activations_waiting is None
        assert one.usage.ticks == 5
