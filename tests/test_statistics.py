"""What is said of an epoch: times, ticks, learning rates."""

import time

import keras
import pytest
from test_probes import BATCH, RATE, K, Watch, make_data, make_model

import fdg_keras
from fdg_keras.conductor import Conductor
from fdg_keras.statistics import StageStatistics, Usage


@pytest.fixture
def seconds(monkeypatch):
    """How long each epoch lasts, between the data and the callbacks."""
    run, found = Conductor.run, []

    def timed(*args, **kwargs):
        start = time.perf_counter()
        statistics = run(*args, **kwargs)
        found.append(time.perf_counter() - start)
        return statistics

    monkeypatch.setattr(Conductor, "run", timed)
    return found


@pytest.mark.parametrize("delay", [0, 2])
def test_times_add_up_to_the_epoch(seconds, delay):
    trainer = fdg_keras.Trainer(make_model(), K, delay=delay)
    trainer.fit(*make_data(2000), BATCH, verbose=0)
    for one in trainer.statistics:
        usage = one.usage
        assert usage.ticks == 2000
        parts = (
            usage.computed,
            usage.waited_activations,
            usage.waited_gradients,
            usage.idle,
        )
        assert all(part >= 0 for part in parts)
        assert usage.total == pytest.approx(sum(parts))
        assert usage.total == pytest.approx(seconds[0], rel=0.1)
        assert one.ms_per_tick == pytest.approx(usage.total / 2)
    # Nothing arrives there.
    assert trainer.statistics[-1].usage.waited_gradients == 0


def test_the_passes_take_the_time_that_stages_say_they_compute():
    trainer = fdg_keras.Trainer(make_model(), K)
    trainer.fit(*make_data(32), BATCH, epochs=2, verbose=0, callbacks=[Watch()])
    for one in trainer.statistics:
        waited = sum(p.starts - p.waits for p in one.passes)
        usage = one.usage
        assert len(one.passes) == 64
        assert waited == pytest.approx(
            usage.waited_activations + usage.waited_gradients, abs=1e-4
        )
        assert sum(p.ends - p.starts for p in one.passes) <= usage.computed


def test_nothing_before_there_was_an_epoch():
    trainer = fdg_keras.Trainer(make_model(), K)
    assert trainer.statistics == []
    trainer.evaluate(*make_data(3), verbose=0)
    assert trainer.statistics == []


def test_nothing_of_stages_that_were_emulated():
    trainer = fdg_keras.Trainer(make_model(), K, emulate=True)
    watch = Watch()
    trainer.fit(*make_data(3), BATCH, verbose=0, callbacks=[watch])
    assert watch.epochs == [[]]


def test_evaluating_and_failing():
    """The one leaves the statistics of training alone, the other none."""
    trainer = fdg_keras.Trainer(make_model(), K)
    trainer.fit(*make_data(3), BATCH, verbose=0)
    before = trainer.statistics
    trainer.evaluate(*make_data(3), verbose=0)
    assert trainer.statistics is before

    def fail(batch, logs):
        raise RuntimeError("no more")

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
    with pytest.raises(RuntimeError, match="no more"):
        trainer.fit(*make_data(3), BATCH, verbose=0, callbacks=[callback])
    assert trainer.statistics == []


def test_learning_rates():
    """Those of a schedule and of a correction, for the update that is next."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [5], [RATE, RATE / 10]
    )
    model = make_model()
    model.compile(keras.optimizers.SGD(schedule), "mse")
    corrections = [fdg_keras.LearningRateRescheduling(20)]
    trainer = fdg_keras.Trainer(model, K, corrections=corrections)
    watch = Watch()
    trainer.fit(*make_data(5), BATCH, epochs=4, verbose=0, callbacks=[watch])
    for epoch, stages in enumerate(watch.epochs):
        step = 5 * (epoch + 1)
        # A boundary is the last step of its rate.
        rate = RATE if step <= 5 else RATE / 10
        for one, tau in zip(stages, (4, 2, 0)):
            factor = tau ** -(1 - min(step / 20, 1)) if tau else 1
            assert one.learning_rate == pytest.approx(rate * factor, rel=1e-5)


def test_rates_that_a_callback_sets():
    watch = Watch()
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    trainer = fdg_keras.Trainer(make_model(), K)
    trainer.fit(
        *make_data(3), BATCH, epochs=2, verbose=0, callbacks=[halve, watch]
    )
    rates = [[s.learning_rate for s in stages] for stages in watch.epochs]
    assert rates[0] == pytest.approx([RATE / 2] * K)
    assert rates[1] == pytest.approx([RATE / 4] * K)


def test_a_plan_is_measured_by_all_epochs_but_the_first():
    """So short ones, too, are enough for advice in the end."""
    trainer = fdg_keras.Trainer(make_model(), K)
    watch = Watch()
    trainer.fit(*make_data(50), BATCH, verbose=0)
    assert "of 50 ticks. After 100" in trainer.plan.advice
    trainer.fit(*make_data(50), BATCH, epochs=3, verbose=0, callbacks=[watch])
    plan = trainer.plan
    assert "of 100 ticks" in plan.advice
    assert "it will be said" not in plan.advice
    later = [[one.usage for one in stages] for stages in watch.epochs[1:]]
    for stage, usages in zip(plan.stages, zip(*later)):
        computed = sum(usage.computed for usage in usages)
        assert stage.measured_s == pytest.approx(computed / 100)
    whole = max(sum(u.total for u in usages) for usages in zip(*later))
    assert plan.measured_step_s == pytest.approx(whole / 100)
    # The next one begins anew.
    trainer.fit(*make_data(3), BATCH, verbose=0)
    assert "of 3 ticks" in trainer.plan.advice


def test_no_ticks():
    one = StageStatistics(0, "CPU:0", Usage(), 0, 0.1, 1)
    assert one.ms_per_tick == 0
