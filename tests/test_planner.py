"""Plans that are measured: what they say, and that training follows them."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import zoo
from keras import layers

import fdg_keras
from fdg_keras import (
    Plan,
    Trainer,
    durations,
    expectations,
    keys,
    laps,
    memory,
    planner,
)
from fdg_keras.advice import Measured, with_measured
from fdg_keras.crossing import STASHES
from fdg_keras.planning import choose_cuts
from fdg_keras.profiles import Profile, ProfileCache
from fdg_keras.profiling import Profiler
from fdg_keras.rates import UpdateRate, transfer_rate
from fdg_keras.resources import Cable
from fdg_keras.schedules import Delayed
from fdg_keras.simulation import simulate
from fdg_keras.slicing import cut_graph, trace_graph
from fdg_keras.stashes import traced_stashes

DEVICE = "/job:localhost/replica:0/task:0/device:CPU:0"


def network(blocks=4):
    """Alike blocks of convolutions, compiled."""
    inputs = keras.Input((8, 8, 3), name="image")
    h = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    for i in range(blocks):
        shortcut = h
        h = layers.Conv2D(4, 3, padding="same", name=f"conv{i}")(h)
        h = layers.BatchNormalization(name=f"norm{i}")(h)
        h = layers.Add(name=f"add{i}")([shortcut, h])
    h = layers.GlobalAveragePooling2D(name="pool")(h)
    model = keras.Model(inputs, layers.Dense(3, name="head")(h))
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Measures in short turns, keeps nothing, warns of nothing."""
    monkeypatch.setattr("fdg_keras.laps._SECONDS", 0.001)
    monkeypatch.setenv("FDG_KERAS_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Splitting will hardly pay")
        yield


def test_a_measured_plan_knows_everything():
    model = network()
    plan = fdg_keras.plan(model, 3, batch_size=8, devices=["CPU:0"] * 3)
    for stage in plan.stages:
        known = dataclasses.asdict(stage)
        assert known.pop("measured_s") is None
        assert all(value is not None for value in known.values())
        assert stage.forward_s > 0
        assert stage.backward_s > 0
        assert len(stage.costs) == len(stage.layers)
        assert stage.peak_bytes > stage.stash_bytes > 0
    assert [s.sends_bytes for s in plan.stages[:-1]] == [
        8 * 4 * s.sends for s in plan.stages[:-1]
    ]
    assert plan.stages[-1].sends_bytes == 0
    # One device has all to do: no step is shorter than all ticks.
    assert plan.step_s >= sum(stage.tick_s for stage in plan.stages)
    assert plan.speed_up == plan.whole_s / plan.step_s


def test_the_cuts_are_the_best_of_all():
    graph = trace_graph(network())
    plan = fdg_keras.plan(network(), 3, 8, [f"CPU:{k}" for k in range(3)])
    costs = np.concatenate([stage.costs for stage in plan.stages])
    ends = [p + 1 for p in graph.legal_cuts()]
    best = min(
        max(
            costs[a:b].sum()
            for a, b in itertools.pairwise([0, i, j, len(costs)])
        )
        for i, j in itertools.combinations(ends, 2)
    )
    slowest = max(sum(stage.costs) for stage in plan.stages)
    np.testing.assert_allclose(slowest, best)


def far_apart(monkeypatch, latency, for_a_byte):
    """Has all devices hand over as slowly as that."""
    monkeypatch.setattr(durations, "share_memory", lambda a, b: False)
    monkeypatch.setattr(
        durations, "transfer_rate", lambda a, b: (latency, for_a_byte)
    )


def test_only_a_cut_that_costs_is_paid_for(monkeypatch):
    """Of three stages the last two share memory; found by trying all cuts."""
    monkeypatch.setattr(
        durations,
        "share_memory",
        lambda a, b: a.endswith("0") == b.endswith("0"),
    )
    monkeypatch.setattr(durations, "transfer_rate", lambda a, b: (0.0, 1e-6))
    model = network(8)
    graph = trace_graph(model)
    plan = fdg_keras.plan(model, 3, 8, [f"CPU:{k}" for k in range(3)])
    first, second, third = plan.stages
    assert first.sends_s == second.returns_s > 0
    assert second.sends_s == third.returns_s == third.sends_s == 0

    costs = np.concatenate([stage.costs for stage in plan.stages])

    def slowest(i, j):
        before, _ = cut_graph(graph, [i - 1])
        crossing = [graph.symbols[v].shape[1:] for v in before.sends]
        paid = 1e-6 * 8 * 4 * sum(map(math.prod, crossing))
        parts = [costs[:i].sum() + paid, costs[i:j].sum() + paid]
        return max(*parts, costs[j:].sum())

    ends = [p + 1 for p in graph.legal_cuts()]
    best = min(slowest(*cuts) for cuts in itertools.combinations(ends, 2))
    np.testing.assert_allclose(slowest(*plan.cuts), best)


def test_handing_over_is_paid_on_both_sides(monkeypatch, tmp_path):
    monkeypatch.setattr(
        durations, "update_rate", lambda *_: UpdateRate(0.0, 1.0)
    )
    model, devices = network(), [f"CPU:{k}" for k in range(3)]
    near = fdg_keras.plan(model, 3, 8, devices, cache_dir=tmp_path)
    # Not so long that the best would be to have little in the middle.
    far_apart(monkeypatch, 1e-7, 0.0)
    far = fdg_keras.plan(model, 3, 8, devices, cache_dir=tmp_path)
    assert far.cuts == near.cuts
    forward = [
        b.forward_s - a.forward_s for a, b in zip(near.stages, far.stages)
    ]
    backward = [
        b.backward_s - a.backward_s for a, b in zip(near.stages, far.stages)
    ]
    np.testing.assert_allclose(forward, [1e-7, 1e-7, 0.0], atol=1e-12)
    np.testing.assert_allclose(backward, [0.0, 1e-7, 1e-7], atol=1e-12)


def test_slow_links_are_cut_where_little_crosses(monkeypatch):
    inputs = keras.Input((64,))
    h = layers.Dense(64, name="wide")(inputs)
    h = layers.Dense(1, name="narrow")(h)
    h = layers.Dense(64, name="wide_again")(h)
    for i in range(4):
        h = layers.Dense(64, name=f"d{i}")(h)
    model = keras.Model(inputs, h)
    model.compile("sgd", "mse")
    far_apart(monkeypatch, 0.0, 1.0)
    plan = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"])
    assert plan.stages[0].layers[-1] == "narrow"
    assert plan.stages[0].sends_bytes == 4 * 8


@pytest.fixture
def with_a_slow_device(monkeypatch):
    """Plans layers for CPU:0, so many times as slow, and CPU:1; who was asked.

    Layers take a second on CPU:1.
    """

    def planned(times, count):
        measured = []

        class Pretended(Profiler):
            def __init__(self, graph, batch_size, device, *rest):
                super().__init__(graph, batch_size, device)
                self.device = device

            def timed(self):
                measured.append(self.device[-1])
                seconds = times if self.device.endswith("0") else 1.0
                return [
                    dataclasses.replace(p, forward_s=seconds, backward_s=0.0)
                    for p in self.untimed()
                ]

        free = UpdateRate(0.0, 1.0)
        monkeypatch.setattr(planner, "description", lambda name: name)
        monkeypatch.setattr(durations, "Profiler", Pretended)
        monkeypatch.setattr(durations, "update_rate", lambda *_: free)
        alike = [layers.Dense(4) for _ in range(count)]
        model = _compiled(keras.Sequential([keras.Input((4,)), *alike]))
        plan = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"])
        assert measured == ["0", "1"]
        return plan

    return planned


def test_a_slow_device_gets_less_to_do(with_a_slow_device):
    """Of devices that differ, each is measured."""
    plan = with_a_slow_device(3.0, 8)
    assert [len(stage.layers) for stage in plan.stages] == [2, 6]


def test_speed_is_compared_with_the_fastest_device(with_a_slow_device):
    """Two devices, of which the first is slow, are not ten times one."""
    plan = with_a_slow_device(10.0, 12)
    assert [len(stage.layers) for stage in plan.stages] == [1, 11]
    assert plan.whole_s == pytest.approx(12.0)
    assert plan.speed_up == pytest.approx(12 / 11, rel=1e-3)
    assert "the fastest device alone" in str(plan)


def test_without_delay_stages_take_turns(tmp_path):
    settings = {"cache_dir": tmp_path, "devices": ["CPU:0", "CPU:1"]}
    with pytest.warns(UserWarning, match="hardly pay"):
        locked = fdg_keras.plan(network(), 2, 8, delay=0, **settings)
    ticks = sum(stage.tick_s for stage in locked.stages)
    assert locked.step_s == pytest.approx(ticks)
    assert locked.speed_up < 1


@pytest.mark.parametrize(
    "limit", [0, "1GB", [1.0], [1, 2, 3], True, np.zeros(()), 10**400]
)
def test_a_limit_is_checked_before_anything_is_measured(monkeypatch, limit):
    monkeypatch.setattr(durations, "Profiler", None)
    with pytest.raises(ValueError, match=r"`memory_limit` to be.*Received"):
        fdg_keras.plan(network(), 2, 8, ["CPU:0"] * 2, memory_limit=limit)


def test_a_plan_of_another_size_of_inputs():
    def convolutions(size):
        inputs = keras.Input((size, size, 3))
        h = inputs
        for _ in range(4):
            h = layers.Conv2D(4, 3)(h)
        return _compiled(
            keras.Model(inputs, layers.GlobalAveragePooling2D()(h))
        )

    plan = fdg_keras.plan(convolutions(16), 2, 8, measure=False)
    Trainer(convolutions(16), plan, ["CPU:0"] * 2)
    with pytest.raises(ValueError, match=r"another size of inputs.*elements"):
        Trainer(convolutions(24), plan, ["CPU:0"] * 2)
    # One of open sizes is planned by one whose sizes are given.
    Trainer(convolutions(None), plan, ["CPU:0"] * 2)


def test_a_plan_on_other_devices_says_so(tmp_path):
    model = network()
    plan = fdg_keras.plan(model, 2, 8, ["CPU:2", "CPU:1"], cache_dir=tmp_path)
    same = Trainer(model, plan, ["CPU:2", "CPU:1"]).plan
    assert not any("was measured for" in note for note in same.notes)
    other = Trainer(model, plan, ["CPU:0", "CPU:1"]).plan
    assert "measured for CPU:2, CPU:1, but the stages are on CPU:0, CPU:1" in (
        str(other).replace("\n", " ")
    )


def test_a_user_without_a_home(monkeypatch, tmp_path):
    for name in ("HOME", "XDG_CACHE_HOME", "FDG_KERAS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    cache = ProfileCache(None)
    cache.write(
        "key",
        Profile(
            0.0, 0.0, 0.0, (), (), (), 0, (), (), 0, 0, (), 0, True, True, ()
        ),
    )
    assert cache.read("key", 0, 0, 0) is None
    assert not list(tmp_path.iterdir())


def test_a_transfer_takes_time():
    latency, for_a_byte = transfer_rate(DEVICE, DEVICE[:-1] + "1")
    assert latency > 0
    assert for_a_byte >= 0


@pytest.mark.parametrize("stash", STASHES)
def test_bytes_of_each_mode(stash):
    """What a plan counts is what the stages, once traced, would keep."""
    model = network()
    graph = trace_graph(model)
    plan = fdg_keras.plan(model, 3, 8, stash=stash, measure=False)
    slices = cut_graph(graph, [end - 1 for end in plan.cuts])
    traced = traced_stashes(graph, slices, DEVICE, 8, stash)
    for late, stage, size in zip((4, 2), plan.stages, traced):
        assert stage.stash_bytes == size.total(late + 1, late)
        assert stage.peak_bytes > stage.stash_bytes


@pytest.mark.parametrize("stash", STASHES)
def test_bytes_of_stages_that_were_trained(stash):
    """They are those that are planned, whoever has chosen the cuts."""
    model = network()
    trainer = Trainer(model, 3, ["CPU:0"] * 3, stash=stash)
    x, y = np.ones((16, 8, 8, 3), "float32"), np.zeros(16)
    trainer.fit(x, y, 8, verbose=0)
    found = trainer.plan
    planned = fdg_keras.plan(
        model, 3, 8, ["CPU:0"] * 3, stash=stash, measure=False
    )
    assert found.cuts == planned.cuts
    for a, b in zip(found.stages, planned.stages):
        assert (a.sends_bytes, a.stash_bytes) == (b.sends_bytes, b.stash_bytes)
    assert (found.batch_size, found.delay, found.stash) == (8, 2, stash)
    assert "stash MiB" in str(found)
    trainer.fit(x, y, 4, verbose=0)
    assert trainer.plan.stages[0].sends_bytes * 2 == found.stages[0].sends_bytes
    # A plan that was given says what it expects.
    again = Trainer(model, planned, ["CPU:0"] * 3, stash=stash)
    again.fit(x, y, 8, verbose=0)
    assert again.plan.stages[0].bytes == planned.stages[0].bytes
    # Stages that are emulated are not there.
    emulated = Trainer(network(), 3, emulate=True)
    emulated.fit(x, y, 8, verbose=0)
    assert emulated.plan.stages[0].stash_bytes is None


@pytest.fixture
def pieces(monkeypatch):
    """Names of the nodes that were measured."""
    made = []
    init = fdg_keras.profiling.Piece.__init__

    def counting(self, node, *rest):
        made.append(node.name)
        init(self, node, *rest)

    monkeypatch.setattr(fdg_keras.profiling.Piece, "__init__", counting)
    return made


def test_what_is_alike_is_measured_once(pieces):
    Profiler(trace_graph(network(blocks=8)), 8, DEVICE).timed()
    assert pieces == ["stem", "conv0", "norm0", "add0", "pool", "head"]


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((4, 8), lambda i: layers.Bidirectional(layers.LSTM(4, **SEQUENCE))),
        ((4, 8), lambda i: layers.RNN(layers.GRUCell(8), **SEQUENCE)),
        ((8,), lambda i: layers.Dropout(0.5, seed=i)),
        ((4, 8), lambda i: layers.TimeDistributed(layers.Dense(8))),
        (
            (8,),
            lambda i: layers.Dense(
                8, kernel_initializer=keras.initializers.HeNormal(seed=i)
            ),
        ),
    ],
)
def test_names_and_seeds_make_no_difference(pieces, shape, make):
    model = keras.Sequential([keras.Input(shape), *map(make, range(4))])
    Profiler(trace_graph(model), 8, DEVICE).untimed()
    # A first layer differs: nobody asks for its input's gradient.
    assert len(pieces) <= 2


SEQUENCE = {"return_sequences": True}


def test_precision_makes_a_difference(pieces):
    model = keras.Sequential(
        [
            keras.Input((8,)),
            *(layers.ReLU(dtype=d) for d in ("float32", "mixed_bfloat16")),
        ]
    )
    Profiler(trace_graph(model), 8, DEVICE).untimed()
    assert len(pieces) == 2


def test_what_was_measured_is_kept(monkeypatch, tmp_path):
    graph = trace_graph(network())
    first = Profiler(graph, 8, DEVICE, cache_dir=tmp_path).timed()
    monkeypatch.setattr("fdg_keras.profiling.Piece", None)
    assert Profiler(graph, 8, DEVICE, cache_dir=tmp_path).timed() == first
    # Of another batch or device nothing is known.
    with pytest.raises(TypeError, match="callable"):
        Profiler(graph, 16, DEVICE, cache_dir=tmp_path).timed()
    with pytest.raises(TypeError, match="callable"):
        Profiler(graph, 8, DEVICE, jit_compile=True, cache_dir=tmp_path).timed()
    # Nor of another machine, or of fewer of its cores.
    for name, value in (
        ("fdg_keras.keys._processor", lambda: "another"),
        ("fdg_keras.keys._own_version", lambda: "0.0"),
        ("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            with pytest.raises(TypeError, match="callable"):
                Profiler(graph, 8, DEVICE, cache_dir=tmp_path).timed()


def test_what_a_machine_tells_of_itself():
    """Its files are read where it is."""
    keys._text.cache_clear()
    spec = tf.DeviceSpec.from_string(DEVICE)
    kind, processor, cores = keys._remote(spec)
    assert (kind, processor) == keys._local(spec)[:2]
    assert cores >= len(os.sched_getaffinity(0))
    assert keys._lines("/proc/no/such/*", DEVICE) == []
    assert keys._lines("/proc", DEVICE) == []
    nowhere = "/job:worker/replica:0/task:0/device:CPU:0"
    assert keys._lines("/proc/cpuinfo", nowhere) == []


def test_devices_of_other_machines_are_told_apart(monkeypatch):
    """By what they have, though a task of that name was another before."""
    files = {}

    def text(pattern, device):
        assert device == "/job:worker/replica:0/task:0/device:CPU:0"
        return files[pattern.split("/")[2]]

    monkeypatch.setattr(keys, "_text", text)
    found = set()
    for cores, gpu in ((2, "A"), (4, "A"), (4, "B"), (4, "")):
        lines = "processor : 0\nmodel name : fast\n\n" * cores
        files.update(cpuinfo=lines, driver=f"Model: {gpu}\nIRQ: 7\n" * 2)
        for kind in ("CPU", "GPU"):
            name = f"/job:worker/replica:0/task:0/device:{kind}:0"
            found.add(keys.where(name))
    assert len(found) == 2 + 4


@pytest.mark.parametrize("kept", [False, True])
def test_rows_that_are_not_samples(tmp_path, kept):
    """Whose count goes into what the batch's does not, found or read again."""
    inputs = keras.Input((4, 3))
    h = keras.ops.reshape(layers.Dense(3)(inputs), (-1, 3))
    for _ in range(2):
        h = layers.Dense(3)(h)
    h = layers.Dense(6)(keras.ops.reshape(h, (-1, 2, 3)))
    model = _compiled(keras.Model(inputs, keras.ops.reshape(h, (-1, 4, 6))))
    graph = trace_graph(model)
    if kept:
        Profiler(graph, 3, DEVICE, cache_dir=tmp_path).timed()
    rows = [
        spec.shape[0]
        for spec in Profiler(graph, 3, DEVICE, cache_dir=tmp_path).specs
    ]
    assert rows == [3, 3, 12, 12, 12, 6, 6, 3]
    plan = fdg_keras.plan(model, 2, 3, ["CPU:0", "CPU:1"], cache_dir=tmp_path)
    assert plan.step_s > 0


def test_rows_that_nobody_knows_before_they_are_there():
    inputs = keras.Input((8,))
    h = layers.Lambda(
        lambda x: tf.boolean_mask(x, x[:, 0] > 0), output_shape=(8,)
    )(layers.Dense(8)(inputs))
    model = _compiled(keras.Model(inputs, layers.Dense(2)(layers.Dense(8)(h))))
    plan = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"])
    assert all(sum(stage.costs) > 0 for stage in plan.stages)


class Twice(layers.Layer):
    """A layer of the user's own."""

    def call(self, x):
        return 2.0 * x

    def compute_output_shape(self, shape):
        return shape


class Applies(layers.Layer):
    """Whose configuration does not say what it does."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


def half(x):
    return 0.5 * x


def no_loss(weights):
    return 0.0


@pytest.mark.parametrize(
    "make",
    [
        Twice,
        lambda: Applies(half),
        lambda: Applies(keras.ops.sin),
        lambda: layers.Lambda(lambda x: x + 1.0),
        lambda: layers.Dense(4, activation=half),
        lambda: layers.TimeDistributed(Twice()),
        lambda: layers.Dense(4, kernel_regularizer=no_loss),
    ],
)
def test_code_of_the_user_is_measured_anew(pieces, tmp_path, make):
    """It may be another the next time, of the same name."""
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, layers.Dense(4)(make()(inputs)))
    graph = trace_graph(model)
    Profiler(graph, 8, DEVICE, cache_dir=tmp_path).timed()
    own, dense = pieces
    again = Profiler(graph, 8, DEVICE, cache_dir=tmp_path)
    assert pieces[2:] == [own]
    # All is measured beside it, in order, as in a step.
    again.timed()
    assert pieces[2:] == [own, dense]


def test_code_of_the_user_is_told_apart(pieces):
    """By what it is, not by its name."""

    def another():
        class Twice(layers.Layer):
            def call(self, x):
                return keras.ops.sin(x)

        return Twice()

    made = [
        layers.Lambda(lambda x: x + 1.0),
        layers.Lambda(lambda x: x * x),
        *(Twice() for _ in range(4)),
        another(),
        another(),
    ]
    model = keras.Sequential([keras.Input((8,)), *made])
    Profiler(trace_graph(model), 8, DEVICE).untimed()
    # Only blocks of the same class are alike.
    assert pieces == [made[k].name for k in (0, 1, 2, 6, 7)]


class Repeats(layers.Layer):
    """Whose configuration leaves out how often, and by what."""

    def __init__(self, times, factors=(1.0,)):
        super().__init__()
        self.times, self._factors = times, list(factors)
        self.dropout = layers.Dropout(0.1)

    def call(self, x):
        for factor in self.times * self._factors:
            x = keras.ops.sin(factor * x)
        return self.dropout(x)

    def get_config(self):
        return {"name": self.name}


def test_what_a_configuration_leaves_out_is_told_apart(pieces):
    made = [
        Repeats(1),
        Repeats(60),
        *(Repeats(1) for _ in range(3)),
        Repeats(1, [2.0]),
        Repeats(60),
        Repeats(1),
    ]
    made[4].dropout.rate = 0.2
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), *made])
    Profiler(trace_graph(model), 8, DEVICE).untimed()
    assert pieces[1:] == [made[k].name for k in (0, 1, 4, 5)]


@dataclasses.dataclass
class Times:
    count: int


@pytest.mark.parametrize(
    "kept",
    [
        lambda n: {"n": n},
        lambda n: {n},
        lambda n: np.int64(n),
        lambda n: np.arange(2000) + n * (np.arange(2000) == 1000),
        lambda n: range(n),
        Times,
        lambda n: [{"n": (Times(n),)}],
    ],
)
def test_whatever_data_a_layer_keeps_tells_it_apart(pieces, kept):
    made = [Repeats(1) for _ in range(3)]
    for layer, n in zip(made, (1, 60, 1)):
        layer.kept = kept(n)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), *made])
    Profiler(trace_graph(model), 8, DEVICE).untimed()
    assert pieces[1:] == [made[0].name, made[1].name]


def test_a_cache_never_fails(tmp_path):
    found = Profile(
        *(1.0, 2.0, 3.0, (True, False), (False,), (True,), 12),
        *((True, True), (False,), 10, 34, (0,), 1),
        cheap=False,
        replays=True,
        shapes=((8, None),),
    )
    cache = ProfileCache(tmp_path)
    cache.write("one", found)
    assert cache.read("one", 2, 1, 1) == found
    assert cache.read("two", 2, 1, 1) is None
    beneath_a_file = ProfileCache(tmp_path / "one.json")
    beneath_a_file.write("one", found)
    assert beneath_a_file.read("one", 2, 1, 1) is None


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "{",
        "null",
        "[1]",
        "7",
        "[" * 100_000,
        {"surplus": 1},
        {"forward_s": "x"},
        {"forward_s": None},
        {"backward_s": -1.0},
        {"processor_s": float("nan")},
        {"forward_s": float("inf")},
        {"forward_s": 1e300},
        {"backward_s": 10**400},
        {"forward_s": True},
        {"keeps_inputs": []},
        {"keeps_inputs": True},
        {"keeps_outputs": [1]},
        {"keeps_weights": ["x", "y"]},
        {"keeps_bytes": "x"},
        {"keeps_bytes": 1.5},
        {"keeps_bytes": 10**25},
        {"selects_inputs": []},
        {"selects_outputs": [1]},
        {"selects_bytes": -1},
        {"views": [7]},
        {"views": []},
        {"views": None},
        {"unsized": -1},
        {"replays": 1},
        {"shapes": []},
        {"shapes": [[8, "4"]]},
        {"shapes": [[8, -4]]},
        {"shapes": [[2**40, 2**40]]},
        {"shapes": 7},
        {"shapes": [[8, 5]]},
        {"shapes": [[8]]},
        {"running_bytes": -1},
    ],
)
def test_a_cache_that_is_spoilt_is_measured_again(pieces, tmp_path, wrong):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    graph = trace_graph(model)
    first = Profiler(graph, 8, DEVICE, cache_dir=tmp_path).timed()
    (path,) = tmp_path.glob("*.json")
    if isinstance(wrong, dict):
        wrong = json.dumps(json.loads(path.read_text()) | wrong)
    path.write_text(wrong)
    again = Profiler(graph, 8, DEVICE, cache_dir=tmp_path).timed()
    assert len(pieces) == 2
    assert again[0].keeps_bytes == first[0].keeps_bytes
    assert Profiler(graph, 8, DEVICE, cache_dir=tmp_path).timed() == again
    assert len(pieces) == 2


def test_costs_are_those_of_the_layers():
    """A layer with a hundred times the work is found to be slower."""
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64, name="small"),
            layers.Dense(2048, name="large"),
            layers.Dense(2048, name="larger"),
        ]
    )
    small, _, larger = Profiler(trace_graph(model), 64, DEVICE).timed()
    assert larger.forward_s > 3 * small.forward_s
    assert larger.backward_s > 3 * small.backward_s
    # The first needs no gradient of its input, what is frozen none at all.
    model.trainable = False
    for found in Profiler(trace_graph(model), 64, DEVICE).timed():
        assert found.backward_s == 0
        assert not found.keeps_bytes


class Sleeps(layers.Layer):
    """Takes 20 milliseconds forward, and 40 backward."""

    def call(self, x):
        @tf.custom_gradient
        def slowly(x):
            return _after(0.02, x), lambda above: _after(0.04, above)

        return slowly(x)


def _after(seconds, x):
    def wait(x):
        time.sleep(seconds)
        return x

    return tf.ensure_shape(tf.numpy_function(wait, [x], x.dtype), x.shape)


def test_each_layer_has_the_time_that_it_takes():
    """All that a layer does, and nothing of what those beside it do."""
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), Sleeps(), layers.Dense(4)]
    )
    before, sleeps, after = Profiler(trace_graph(model), 2, DEVICE).timed()
    assert sleeps.forward_s >= 0.019
    assert sleeps.backward_s >= 0.039
    for dense in before, after:
        assert 0 < dense.forward_s < sleeps.forward_s
        assert 0 < dense.backward_s < sleeps.backward_s


@pytest.mark.parametrize(
    "indices", [lambda x: x, lambda x: keras.ops.cast(1000 * x, "int32")]
)
def test_indices_that_are_floats_or_computed(indices):
    """What stands for a batch gives none that is out of range."""
    inputs = keras.Input((4,))
    h = layers.Flatten()(layers.Embedding(5, 3)(indices(inputs)))
    model = keras.Model(inputs, layers.Dense(2)(h))
    assert fdg_keras.plan(model, 2, 64, ["CPU:0", "CPU:1"]).step_s > 0


class Makes(layers.Layer):
    """Makes another dtype than it tells Keras, as a softmax in float32 may."""

    def __init__(self, made):
        super().__init__()
        self._made = made

    def call(self, x):
        return keras.ops.cast(x, self._made)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


@pytest.mark.parametrize("made", ["float16", "int32", "float64"])
def test_a_dtype_that_was_not_told(made):
    inputs = keras.Input((4,))
    h = Makes(made)(layers.Dense(4)(inputs))
    model = keras.Model(inputs, layers.Dense(2)(h))
    plan = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"])
    assert all(cost > 0 for stage in plan.stages for cost in stage.costs)


class Lower(layers.Layer):
    def call(self, x):
        return tf.strings.lower(x)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, "string")


def test_strings_between_layers():
    inputs = keras.Input((4,), dtype="string")
    h = Lower()(inputs)
    h = layers.Embedding(4, 3)(layers.StringLookup(vocabulary=["a", "b"])(h))
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(h)))
    assert fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"]).step_s > 0


class Picky(layers.Layer):
    """Takes what is above a limit, if it must."""

    def __init__(self, limit, name):
        super().__init__(name=name)
        self._limit = limit

    def call(self, x):
        limit = tf.constant(self._limit, x.dtype)
        with tf.control_dependencies([tf.debugging.assert_greater(x, limit)]):
            return tf.identity(x)


def test_a_layer_that_does_not_take_samples():
    """It is named; one that does not take what others make runs alone."""

    def model(first, last):
        inputs = keras.Input((4,))
        h = Picky(last, name="last")(Picky(first, name="first")(inputs) - 5)
        return keras.Model(inputs, layers.Dense(2)(h))

    assert fdg_keras.plan(model(-1.0, -1.0), 2, 8, ["CPU:0"] * 2).step_s > 0
    with pytest.raises(
        ValueError, match=r"(?s)'last' does not take .*`measure=False`"
    ):
        fdg_keras.plan(model(-1.0, 1.0), 2, 8, ["CPU:0"] * 2)


class Unranked(layers.Layer):
    def call(self, x):
        twice = tf.numpy_function(
            lambda x: 2 * x, [tf.stop_gradient(x)], tf.float32
        )
        return twice

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


class Ranked(layers.Layer):
    def call(self, x, y):
        return x + tf.ensure_shape(y, [None, 4])


def test_bytes_of_a_stage_that_sends_what_has_no_rank():
    inputs = keras.Input((4,))
    h = layers.Dense(4)(inputs)
    h = Ranked()(h, Unranked(name="unranked")(h))
    model = _compiled(keras.Model(inputs, layers.Dense(2)(h)))
    trainer = Trainer(model, ["unranked"], ["CPU:0", "CPU:1"])
    trainer.fit(np.ones((16, 4)), np.ones((16, 2)), 8, verbose=0)
    # What is known: the other tensor.
    assert trainer.plan.stages[0].sends_bytes == 4 * 4 * 8


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_any_model_can_be_planned(name):
    model = zoo.ZOO[name]().model
    plan = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"])
    assert plan.step_s > 0
    assert "steps/s" in str(plan)


def test_not_measured():
    model = network()
    plan = fdg_keras.plan(model, 3, 8, ["CPU:0"] * 3, measure=False)
    assert plan.cuts == Trainer(model, 3, ["CPU:0"] * 3).plan.cuts
    assert plan.step_s is None
    assert plan.speed_up is None
    assert dataclasses.replace(plan, step_s=0.0, whole_s=1.0).speed_up is None
    assert all(stage.tick_s is None for stage in plan.stages)
    assert all(stage.peak_bytes > 0 for stage in plan.stages)
    assert "ms" not in str(plan)


def test_a_plan_travels_as_text():
    plan = fdg_keras.plan(network(), 2, 8, ["CPU:0", "CPU:1"])
    assert Plan.from_json(plan.to_json()) == plan
    record = json.loads(plan.to_json())
    record["version"] = 99
    for text in ("", "[]", "{}", json.dumps(record), "7", "[" * 100_000):
        with pytest.raises(ValueError, match=r"Plan.to_json.*Received"):
            Plan.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", True),
        ("stages", []),
        ("stages", {}),
        ("stages", [3]),
        ("batch_size", "x"),
        ("batch_size", 0),
        ("stash", "all"),
        ("delay", -1),
        ("step_s", "fast"),
        ("notes", [1]),
        ("advice", 1),
        ("surplus", 1),
        ("stage.layers", []),
        ("stage.layers", "abc"),
        ("stage.layers", [1, 2]),
        ("stage.costs", [1.0]),
        ("stage.costs", ["a", "b", "c"]),
        ("stage.device", 3),
        ("stage.forward_s", "x"),
        ("stage.forward_s", -1.0),
        ("stage.backward_s", float("nan")),
        ("stage.backward_s", float("inf")),
        ("stage.backward_s", 1e300),
        ("stage.costs", [10**400] * 3),
        ("stage.peak_bytes", 10**25),
        ("stage.parameters", "x"),
        ("stage.parameters", 1.5),
        ("stage.peak_bytes", 1.5),
        ("stage.bytes", 7),
        ("stage.bytes", {"batch": 1}),
        ("stage.bytes", {"batch": -1}),
        ("stage.surplus", 1),
    ],
)
def test_nonsense_is_no_plan(name, value):
    model = keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4) for _ in range(3))]
    )
    text = fdg_keras.plan(model, 1, 8, measure=False).to_json()
    assert Plan.from_json(text).stages
    record = json.loads(text)
    field = name.rpartition(".")[2]
    (record["stages"][0] if "." in name else record)[field] = value
    with pytest.raises(ValueError, match=r"Plan.to_json.*Received"):
        Plan.from_json(json.dumps(record))


def test_a_plan_can_be_simulated():
    """Equal devices, nothing in the way: the pace of the slowest stage."""
    devices = [f"CPU:{k}" for k in range(3)]
    plan = fdg_keras.plan(network(), 3, 8, devices)
    found = simulate(plan.as_costs())
    slowest = max(stage.tick_s for stage in plan.stages)
    assert found.seconds_per_step == pytest.approx(slowest, rel=1e-6)
    largest = max(stage.sends_bytes for stage in plan.stages)
    slow = simulate(plan.as_costs(), Cable(largest / 9.0))
    assert slow.seconds_per_step == pytest.approx(9.0, rel=1e-3)
    unmeasured = fdg_keras.plan(network(), 3, 8, devices, measure=False)
    with pytest.raises(ValueError, match=r"measured.*Received"):
        unmeasured.as_costs()


@pytest.mark.parametrize("stash", STASHES)
def test_a_simulation_agrees_with_the_plan(monkeypatch, stash):
    """Nothing counts twice: copies, forwards again, handing over."""
    far_apart(monkeypatch, 0.0, 1e-9)
    devices = [f"CPU:{k}" for k in range(3)]
    plan = fdg_keras.plan(network(), 3, 8, devices, stash=stash)
    found = simulate(plan.as_costs(), schedule=Delayed(2), stash=stash)
    computing = [stage.computing_s for stage in plan.stages]
    assert found.seconds_per_step == pytest.approx(max(computing), rel=1e-6)
    assert sum(s.sends_s + s.returns_s for s in plan.stages) > 0
    peaks = [stage.peak_bytes for stage in plan.stages]
    assert [int(s.peak_bytes) for s in found.stages] == peaks


def test_replay_takes_a_forward_more(monkeypatch):
    model = network()
    kept = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"])
    again = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"], stash="replay")
    # Of one device by back-propagation nothing is run again.
    assert again.whole_s == pytest.approx(kept.whole_s, rel=0.2)
    assert sum(s.tick_s - s.again_s for s in again.stages) == pytest.approx(
        sum(s.tick_s for s in kept.stages), rel=0.2
    )
    assert all(stage.again_s > 0 for stage in again.stages)


def test_selective_runs_cheap_layers_again():
    made = [
        keras.layers.Dense(16),
        keras.layers.BatchNormalization(),
        keras.layers.Activation("gelu"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(16, "tanh"),
        keras.layers.LayerNormalization(),
    ]
    model = keras.Sequential([keras.Input((16,)), *made])
    profiles = Profiler(trace_graph(model), 8, DEVICE).timed()
    assert [p.cheap for p in profiles] == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    plan = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"], stash="selective")
    first, last = plan.stages
    cheap = sum(p.forward_s for p in profiles[: len(first.layers)] if p.cheap)
    assert first.again_s == pytest.approx(cheap)
    assert last.again_s == 0  # It has nothing in flight.
    without = fdg_keras.plan(
        model, 2, 8, ["CPU:0", "CPU:1"], 0, stash="selective"
    )
    assert all(stage.again_s == 0 for stage in without.stages)


def test_selective_has_its_batch_again_in_the_backward():
    model = network()
    exact, selective = (
        fdg_keras.plan(model, 3, 8, stash=stash, measure=False)
        for stash in ("exact", "selective")
    )
    assert exact.cuts == selective.cuts
    for a, b in zip(exact.stages, selective.stages):
        assert b.bytes.batch + b.bytes.again == a.bytes.batch
    # The last one, which runs its backward at once, saves nothing.
    assert exact.stages[-1].peak_bytes == selective.stages[-1].peak_bytes
    assert exact.stages[0].peak_bytes > selective.stages[0].peak_bytes


def test_what_loops_keep_is_counted():
    """As much as the same layers without a loop keep, or so."""

    def peak(**how):
        inputs = h = keras.Input((20, 8))
        for _ in range(2):
            h = layers.LSTM(16, return_sequences=True, **how)(h)
        model = keras.Model(inputs, h)
        return fdg_keras.plan(model, 2, 8, measure=False).stages[0].peak_bytes

    assert peak() == pytest.approx(peak(unroll=True), rel=0.25)


def endless(x):
    return keras.ops.while_loop(
        lambda x: keras.ops.sum(x) > 1, lambda x: (keras.ops.sin(x) / 2,), (x,)
    )[0]


def test_loops_of_unknown_length_are_named():
    inputs = keras.Input((8,))
    h = layers.Dense(8)(inputs)
    h = layers.Lambda(endless, output_shape=(8,))(h)
    model = _compiled(keras.Model(inputs, layers.Dense(8)(h)))
    plan = fdg_keras.plan(model, 3, 8, measure=False)
    (note,) = plan.notes
    assert "is needed by stage 1:" in note
    with pytest.warns(UserWarning, match="stage 1: .* not sure to hold"):
        fdg_keras.plan(model, 3, 8, measure=False, memory_limit=10**9)


def test_sizes_that_are_left_open():
    inputs = keras.Input((None, 64), name="words")
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(4)(inputs)))
    with pytest.warns(UserWarning, match="'words'.*static shapes"):
        plan = fdg_keras.plan(model, 2, 8, measure=False)
    assert "were taken for 1" in str(plan)
    inputs = keras.Input((10, 64))
    h = layers.Dense(4)(inputs)
    model = _compiled(keras.Model(inputs, layers.Dense(3)(h)))
    assert fdg_keras.plan(model, 2, 8, measure=False).notes == ()


def test_a_batch_on_another_axis_is_no_open_size():
    inputs = keras.Input((10, 64))
    h = keras.ops.transpose(layers.Dense(4)(inputs), (1, 0, 2))
    h = keras.ops.transpose(layers.Dense(3)(h), (1, 0, 2))
    model = _compiled(keras.Model(inputs, h))
    assert fdg_keras.plan(model, 2, 8, measure=False).notes == ()


def test_selective_has_room_where_exact_has_none():
    inputs = h = keras.Input((16, 16, 3))
    for _ in range(4):
        h = layers.Conv2D(8, 3, padding="same", use_bias=False)(h)
        h = layers.ReLU()(layers.BatchNormalization()(h))
    model = _compiled(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h))))

    def planned(stash, limit=None):
        return fdg_keras.plan(
            model, 2, 8, stash=stash, measure=False, memory_limit=limit
        )

    def peak(plan):
        return max(stage.peak_bytes for stage in plan.stages)

    limit = (peak(planned("selective")) + peak(planned("exact"))) // 2
    assert peak(planned("selective", limit)) <= limit
    with pytest.raises(ValueError, match="does not fit"):
        planned("exact", 0.5 * peak(planned("selective")))
    with pytest.raises(ValueError, match="counted layer by layer"):
        planned("selective", 0.5 * peak(planned("selective")))


def test_selective_is_within_its_limit_though_layers_keep_less(monkeypatch):
    """Of whole stages it keeps a little more, now and then."""

    def too_little(graph, profiles, sizes):
        return np.zeros([0, 4], int)

    model = network(8)
    whole, exact = (
        [
            stage.peak_bytes
            for stage in fdg_keras.plan(
                model, 2, 8, stash=stash, measure=False
            ).stages
        ]
        for stash in ("selective", "exact")
    )
    monkeypatch.setattr(memory, "reads_if_cheap_runs_again", too_little)
    for limit in (max(whole), max(exact)):
        plan = fdg_keras.plan(
            model, 2, 8, stash="selective", measure=False, memory_limit=limit
        )
        assert max(s.peak_bytes for s in plan.stages) <= limit
    with pytest.raises(ValueError, match='here it counts as much as "exact"'):
        fdg_keras.plan(
            model,
            2,
            8,
            stash="selective",
            measure=False,
            memory_limit=0.73 * min(max(whole), max(exact)),
        )


def test_a_limit_is_that_of_a_device():
    model, devices = network(8), ["CPU:0", "CPU:1"] * 2

    def used(plan):
        return [
            sum(s.peak_bytes for s in plan.stages if s.device.endswith(name))
            for name in ("CPU:0", "CPU:1")
        ]

    free = fdg_keras.plan(model, 4, 8, devices, measure=False)
    # Though its stages need unequal parts of it.
    exact = fdg_keras.plan(
        model, 4, 8, devices, measure=False, memory_limit=max(used(free))
    )
    assert exact.cuts == free.cuts
    limit = 0.98 * max(used(free))
    # Each stage of it is below the limit, but not those of a device together.
    assert max(stage.peak_bytes for stage in free.stages) < limit
    held = fdg_keras.plan(
        model, 4, 8, devices, measure=False, memory_limit=limit
    )
    assert max(used(held)) <= limit
    with pytest.raises(ValueError, match="each of 2 stages of its device"):
        fdg_keras.plan(
            model, 4, 8, devices, measure=False, memory_limit=0.5 * limit
        )


def test_the_batch_of_the_model():
    inputs = keras.Input(batch_shape=(64, 8))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(4)(inputs)))
    with pytest.raises(ValueError, match=r"inputs, 64.*Received: batch_size=8"):
        fdg_keras.plan(model, 2, 8, measure=False)
    assert fdg_keras.plan(model, 2, 64, measure=False).batch_size == 64
    with pytest.raises(ValueError, match=r"does not fit") as caught:
        fdg_keras.plan(model, 2, 64, measure=False, memory_limit=100)
    assert "batch_size=" not in str(caught.value)


def test_a_model_without_layers():
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match=r"one layer or more.*Received"):
        fdg_keras.plan(keras.Model(inputs, inputs), 1, 8)


def test_what_a_trainer_refuses_is_not_planned():
    class Own(keras.Model):
        def train_step(self, data):
            return {}

    inputs = keras.Input((4,))
    model = Own(inputs, layers.Dense(3)(layers.Dense(4)(inputs)))
    fdg_keras.plan(model, 2, 8, measure=False)
    with pytest.raises(ValueError, match="overrides `train_step`"):
        fdg_keras.plan(_compiled(model), 2, 8, measure=False)


def test_defaults():
    plan = fdg_keras.plan(network(), measure=False)
    assert (len(plan.stages), plan.batch_size) == (4, 128)
    assert (plan.delay, plan.stash) == (2, "exact")


def test_training_follows_a_plan():
    model = network()
    plan = fdg_keras.plan(model, 3, 8, ["CPU:0", "CPU:1", "CPU:2"])
    trainer = Trainer(model, plan, ["CPU:3", "CPU:4", "CPU:5"])
    assert trainer.plan == plan.on(
        [f"/job:localhost/replica:0/task:0/device:CPU:{k}" for k in (3, 4, 5)]
    )
    x, y = np.ones((32, 8, 8, 3), "float32"), np.zeros(32)
    trainer.fit(x, y, batch_size=8, verbose=0)
    after = trainer.plan
    assert all(stage.measured_s > 0 for stage in after.stages)
    assert [s.forward_s for s in after.stages] == [
        s.forward_s for s in plan.stages
    ]
    assert "measured ms" in str(after)
    assert "Measured: stage" in str(after)
    # Utilisation that comes back: what is measured beside what is expected.
    assert after.measured_step_s >= max(s.measured_s for s in after.stages)
    assert f"Measured: {1 / after.measured_step_s:.3g} steps/s" in str(after)
    assert "measured %" in str(after)
    assert Plan.from_json(after.to_json()) == after
    # Neither is it the plan's own, nor does it add up.
    assert trainer.plan == after
    assert all(stage.measured_s is None for stage in plan.stages)


def test_a_plan_of_other_settings_says_so():
    model = network()
    devices = ["CPU:0", "CPU:1"]
    plan = fdg_keras.plan(model, 2, 8, devices, measure=False)
    trainer = Trainer(model, plan, devices, delay=1, stash="replay")
    assert "of delay=2, stash='exact', but" in trainer.plan.advice
    assert "with delay=1, stash='replay':" in trainer.plan.advice
    x, y = np.ones((32, 8, 8, 3), "float32"), np.zeros(32)
    trainer.fit(x, y, batch_size=16, verbose=0)
    assert "of batch_size=8, delay=2" in trainer.plan.advice
    assert "with batch_size=16, delay=1" in trainer.plan.advice
    same = Trainer(model, plan, devices)
    same.fit(x, y, batch_size=8, verbose=0)
    assert "make a plan" not in same.plan.advice


def test_a_plan_without_costs_of_layers_gives_no_advice():
    """As text may have it; what was measured is shown nevertheless."""
    devices = ["CPU:0", "CPU:1"]
    model = network()
    record = json.loads(fdg_keras.plan(model, 2, 8, devices).to_json())
    record["stages"][1]["costs"] = []
    plan = fdg_keras.Plan.from_json(json.dumps(record))
    trainer = Trainer(model, plan, devices)
    x, y = np.ones((32, 8, 8, 3), "float32"), np.zeros(32)
    trainer.fit(x, y, batch_size=8, verbose=0)
    assert all(stage.measured_s > 0 for stage in trainer.plan.stages)
    assert trainer.plan.advice is None


def test_a_plan_of_an_earlier_run_is_as_it_was_before_that():
    """What was measured and advised then is not of the next run."""
    model = network()
    devices = ["CPU:0", "CPU:1"]
    plan = fdg_keras.plan(model, 2, 8, devices)
    x, y = np.ones((32, 8, 8, 3), "float32"), np.zeros(32)
    first = Trainer(model, plan, devices, delay=1)
    before = Trainer(model, plan, devices).plan
    first.fit(x, y, batch_size=8, verbose=0)
    assert "delay=1" in first.plan.advice
    assert "the slowest" in first.plan.advice
    assert str(first.plan).endswith(first.plan.advice)
    second = Trainer(model, first.plan, devices)
    assert second.plan == before
    assert second.plan.advice is None
    second.fit(x, y, batch_size=8, verbose=0)
    assert str(second.plan).count("the slowest, it computes") == 1
    assert "delay=1" not in str(second.plan)


def test_a_plan_of_another_model():
    plan = fdg_keras.plan(network(4), 2, 8, measure=False)
    with pytest.raises(
        ValueError, match="another model: expected layer 'conv3'"
    ):
        Trainer(network(3), plan)


def test_a_plan_of_a_model_with_other_sizes():
    plan = fdg_keras.plan(network(), 2, 8, measure=False)
    inputs = keras.Input((8, 8, 5), name="image")
    other = keras.models.clone_model(network(), input_tensors=inputs)
    with pytest.raises(ValueError, match=r"stage 0, 'stem' to .* parameters"):
        Trainer(_compiled(other), plan)


def test_a_plan_knows_layers_that_were_named_by_keras():
    """Their numbers count all that a process has made before."""

    def unnamed():
        inputs = keras.Input((4,))
        h = layers.Dense(4)(layers.Dense(4)(inputs) * 2.0)
        return _compiled(keras.Model(inputs, h))

    plan = fdg_keras.plan(unnamed(), 2, 8, measure=False)
    assert Trainer(unnamed(), plan).plan.cuts == plan.cuts


def test_a_plan_does_not_split_a_shared_layer():
    """Two layers there, one here: of the same names, but for numbers."""

    def twice(*hidden):
        inputs = keras.Input((8,))
        h = layers.ReLU()(hidden[0](inputs))
        return _compiled(keras.Model(inputs, layers.Dense(2)(hidden[-1](h))))

    apart = twice(layers.Dense(8), layers.Dense(8))
    plan = fdg_keras.plan(apart, 4, 8, ["CPU:0"] * 4, measure=False)
    # As many parameters in each stage as the shared ones have.
    with pytest.raises(
        ValueError, match=r"cannot be cut after .*used on both sides.*Received"
    ):
        Trainer(twice(layers.Dense(8)), plan)


def test_advice_moves_a_cut_from_the_slowest_stage():
    graph = trace_graph(network(6))
    model = network(6)
    trainer = Trainer(model, ["conv0"], ["CPU:0", "CPU:1"])
    plan = trainer.plan
    seconds = [1e-3 * len(stage.layers) for stage in plan.stages]
    # All layers take equally long, and so many are in the second stage.
    plan = dataclasses.replace(
        plan,
        stages=tuple(
            dataclasses.replace(s, costs=(1.0,) * len(s.layers))
            for s in plan.stages
        ),
    )
    note = with_measured(graph, plan, Measured(seconds, 0.1, 100)).advice
    assert "stage 1 is the slowest" in note
    assert "Cut after 'conv3' instead of 'conv0'" in note
    mixed = plan.on(["/job:worker/task:0/device:CPU:0", plan.stages[1].device])
    note = with_measured(graph, mixed, Measured(seconds, 0.1, 100)).advice
    assert "stage 1 is the slowest" in note
    assert "Devices are of several kinds: `fdg_keras.plan` measures" in note
    balanced = Trainer(model, ["conv3"], ["CPU:0", "CPU:1"]).plan
    measured = Measured([1e-3, 1.01e-3], 0.1, 100)
    note = with_measured(graph, balanced, measured).advice
    assert "no cut is worth moving" in note
    # Few ticks are no base for advice.
    few = with_measured(graph, plan, Measured(seconds, 0.1, 99))
    assert "on average of 99 ticks. After 100 in one epoch" in few.advice
    assert "instead of" not in few.advice
    assert [s.measured_s for s in few.stages] == seconds


def test_it_says_when_splitting_does_not_pay(monkeypatch):
    monkeypatch.setattr("fdg_keras.laps._SECONDS", 0.02)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.Dense(4)]
    )
    with pytest.warns(UserWarning, match="hardly pay.*of its own"):
        plan = fdg_keras.plan(model, 2, 8, ["CPU:0", "CPU:1"])
    assert "hardly pay" in str(plan)


def plan_of(*ticks, step_s, whole_s, devices=None):
    """A plan whose stages have one layer each."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            *(layers.Dense(4, name=f"d{i}") for i in range(len(ticks))),
        ]
    )
    names = [f"d{i}" for i in range(len(ticks) - 1)]
    plan = Trainer(_compiled(model), names, ["CPU:0"] * len(ticks)).plan
    stages = tuple(
        dataclasses.replace(s, costs=(t,), forward_s=t / 2, backward_s=t / 2)
        for s, t in zip(plan.stages, ticks)
    )
    return dataclasses.replace(
        plan, stages=stages, step_s=step_s, whole_s=whole_s
    )


def _compiled(model):
    model.compile("sgd", "mse")
    return model


def test_cores_that_are_shared_do_no_more_than_there_are(monkeypatch):
    """Whatever their clocks say, with other programs beside this one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    ticks = [0.1] * 4
    plan = plan_of(*ticks, step_s=None, whole_s=sum(ticks))
    stages = tuple(
        dataclasses.replace(s, device=f"CPU:{k}")
        for k, s in enumerate(plan.stages)
    )
    plan = dataclasses.replace(plan, stages=stages, delay=2, stash="exact")
    for processor_s in (0.1, 0.4):
        found = expectations.expected(plan, processor_s, shared=True)
        assert 1.9 < found.speed_up < 2
    found = expectations.expected(plan, 0.6, shared=True)
    assert 1.3 < found.speed_up < 1.35
    found = expectations.expected(plan, 0.1, shared=False)
    assert found.speed_up == pytest.approx(4)


@pytest.mark.parametrize(
    ("plan", "cores", "reason"),
    [
        (((0.1, 0.1), 0.2, 0.2), 2, "share the 2 cores of one machine"),
        (((0.1, 0.1), 0.2, 0.2), None, "fewer devices than stages"),
        (((0.01, 0.19), 0.19, 0.2), None, "'d1' alone takes 95 % of the time"),
    ],
)
def test_why_splitting_does_not_pay(plan, cores, reason):
    ticks, step_s, whole_s = plan
    found = plan_of(*ticks, step_s=step_s, whole_s=whole_s)
    assert reason in expectations._reason(found, max(ticks), cores)


def test_memory_limits_move_cuts():
    model = network(8)
    devices = [f"CPU:{k}" for k in range(2)]
    free = fdg_keras.plan(model, 2, 8, devices, measure=False)
    limit = int(0.9 * max(stage.peak_bytes for stage in free.stages))
    held = fdg_keras.plan(
        model, 2, 8, devices, measure=False, memory_limit=limit
    )
    assert held.cuts != free.cuts
    assert all(stage.peak_bytes <= limit for stage in held.stages)


def test_memory_limits_that_cannot_be_met():
    with pytest.raises(
        ValueError, match=r"stage \d of 2 needs .* What would fit: .*replay"
    ):
        fdg_keras.plan(network(8), 2, 64, measure=False, memory_limit=3 * 2**19)


def test_workers_are_looked_after_while_they_measure(monkeypatch):
    """One that is lost meanwhile does not hold up the plan for ever."""
    inside = []

    class Watching(contextlib.ExitStack):
        def __init__(self, devices):
            super().__init__()
            inside.append([name[-5:] for name in devices])
            self.callback(inside.clear)

    timed = laps.timed
    monkeypatch.setattr(planner, "Watch", Watching)
    monkeypatch.setattr(
        laps,
        "timed",
        lambda *args: timed(*args) if inside == [["CPU:0"] * 2] else 1 / 0,
    )
    fdg_keras.plan(network(), 2, 8, ["CPU:0"] * 2)
    assert inside == []


def test_what_does_not_fit_is_not_measured(monkeypatch):
    monkeypatch.setattr(laps, "timed", None)
    with pytest.raises(ValueError, match="What would fit"):
        fdg_keras.plan(network(), 2, 64, memory_limit=2**20)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), tf.errors.ResourceExhaustedError(None, None, "OOM")],
)
def test_a_layer_that_does_not_fit_is_named(monkeypatch, error):
    run = laps._Laps.run
    together = []

    def limited(self):
        names = [piece.node.name for piece in self._pieces]
        together.append(names)
        if "conv0" in names:
            raise error
        return run(self)

    monkeypatch.setattr(laps._Laps, "run", limited)
    with pytest.raises(
        ValueError, match=r"'conv0' alone needs more.* batch_size=8$"
    ):
        fdg_keras.plan(network(), 2, 8)
    # What does not fit at once is measured in two halves.
    stem, conv, norm, *rest = together[0]
    assert together[1:] == [[stem, conv, norm], [stem], [conv, norm], [conv]]
    assert rest == ["add0", "pool", "head"]


def test_devices_that_are_alike_are_looked_at_once(pieces):
    fdg_keras.plan(
        network(), 3, 8, [f"CPU:{k}" for k in range(3)], measure=False
    )
    assert pieces == ["stem", "conv0", "norm0", "add0", "pool", "head"]


def test_a_model_that_is_not_compiled_has_a_note():
    model = network()
    bare = keras.Model(model.inputs, model.outputs)
    found = fdg_keras.plan(bare, 2, 8, measure=False)
    assert "not compiled" in str(found)
    assert "not compiled" not in str(fdg_keras.plan(model, 2, 8, measure=False))


@pytest.mark.parametrize(
    "wrong",
    [
        {"splits": 0},
        {"splits": 2.0},
        {"splits": 400},
        {"batch_size": 0},
        {"batch_size": None},
        {"batch_size": 10**13},
        {"delay": -1},
        {"stash": "all"},
        {"devices": ["TPU:7"]},
        {"devices": 5},
        {"memory_limit": [1, 2, 3]},
        {"cache_dir": 5},
    ],
)
def test_bad_input(wrong):
    with pytest.raises(ValueError, match="Received"):
        fdg_keras.plan(network(), **wrong)


def test_a_stage_more_leaves_the_model_at_home():
    """What one stage trained in place waits there for the other one."""
    wide = [layers.Dense(256) for _ in range(8)]
    model = _compiled(keras.Sequential([keras.Input((256,)), *wide]))

    def plan(splits, limit=None):
        devices = [f"CPU:{k}" for k in range(splits)]
        return fdg_keras.plan(
            model, splits, 8, devices, measure=False, memory_limit=limit
        )

    limit = int(0.6 * plan(1).stages[0].peak_bytes)
    with pytest.raises(ValueError, match="What would fit") as refused:
        plan(1, limit)
    said = re.search(r"splits=(\d+)", str(refused.value))
    plan(int(said[1]), limit)  # fits
    with pytest.raises(ValueError, match="of 2 needs"):
        plan(2, limit)


def test_a_limit_that_stages_share_with_the_model():
    """What they train in place does not wait beside them."""
    wide = [layers.Dense(256) for _ in range(8)]
    model = _compiled(keras.Sequential([keras.Input((256,)), *wide]))

    def plan(limit=None):
        devices = ["CPU:0", "CPU:0", "CPU:1"]
        found = fdg_keras.plan(
            model, 3, 8, devices, measure=False, memory_limit=limit
        )
        return sum(stage.peak_bytes for stage in found.stages[:2])

    limit = int(1.05 * plan())
    assert plan(limit) <= limit
    with pytest.raises(ValueError, match="each of 2 stages of its device"):
        plan(0.5 * limit)


def test_a_model_of_one_batch_size_is_refused_as_others():
    """No smaller batch is proposed, nor does trying one fail."""
    inputs = keras.Input((8,))
    h = keras.ops.reshape(layers.Dense(8)(inputs), (16, 8))
    h = keras.ops.reshape(layers.Dense(8)(h), (8, 16))
    model = _compiled(keras.Model(inputs, layers.Dense(3)(h)))
    with pytest.raises(ValueError, match="does not fit") as refused:
        fdg_keras.plan(model, 2, 16, measure=False, memory_limit=100)
    assert "batch_size=" not in str(refused.value)


def test_a_model_of_some_batch_sizes_is_proposed_one_of_them():
    """Of 32, 16, 8, 4, 2 and 1 it can have three."""
    inputs = keras.Input((8,))
    h = keras.ops.reshape(layers.Dense(64)(inputs), (-1, 8, 64))
    h = layers.Dense(64)(keras.ops.reshape(h, (-1, 64)))
    model = _compiled(keras.Model(inputs, layers.Dense(3)(h)))

    def plan(batch, limit=None):
        found = fdg_keras.plan(
            model, 2, batch, measure=False, memory_limit=limit
        )
        return max(stage.peak_bytes for stage in found.stages)

    limit = 1.05 * plan(32)
    with pytest.raises(ValueError, match="batch_size=32"):
        plan(64, limit)
    assert plan(32, limit) <= limit


def test_numpy_numbers_become_json():
    plan = fdg_keras.plan(
        network(), np.int64(2), np.int64(8), delay=np.int64(2), measure=False
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_choose_cuts_takes_a_plan():
    model = network()
    plan = fdg_keras.plan(model, 4, 8, measure=False)
    cuts = choose_cuts(trace_graph(model), plan)
    assert tuple(cut + 1 for cut in cuts) == plan.cuts


def test_a_stage_that_hands_over_is_not_busy():
    found = plan_of(0.1, 0.2, step_s=0.2, whole_s=0.3)
    first, last = found.stages
    first = dataclasses.replace(first, sends_s=0.02, returns_s=0.01)
    assert first.computing_s == pytest.approx(0.07)
    assert first.tick_s == 0.1
    assert last.computing_s == last.tick_s
    table = str(dataclasses.replace(found, stages=(first, last))).splitlines()
    assert [line.split()[-1] for line in table[1:3]] == ["35", "100"]
    assert dataclasses.replace(first, forward_s=None).computing_s is None


def test_a_picture():
    """Each stage has a bar, of its colours, as long as its tick is."""
    found = plan_of(0.1, 0.2, step_s=0.2, whole_s=0.3)
    picture = np.array(found.plot())
    assert picture.shape[1] == 900
    blue = (picture == (0x3F, 0x68, 0xA8)).all(-1).sum()
    orange = (picture == (0xB9, 0x61, 0x1B)).all(-1).sum()
    assert blue == pytest.approx(orange, rel=0.05)
    assert blue == pytest.approx(1.5 * 300 * 31, rel=0.1)


def test_a_picture_of_what_was_measured():
    """A thin bar says what a stage took, at the scale of the others."""
    found = plan_of(0.1, 0.2, step_s=0.2, whole_s=0.3)
    before = (np.array(found.plot()) == (0x22, 0x22, 0x22)).all(-1)
    seen = tuple(
        dataclasses.replace(stage, measured_s=seconds)
        for stage, seconds in zip(found.stages, (0.1, 0.4))
    )
    picture = np.array(dataclasses.replace(found, stages=seen).plot())
    after = (picture == (0x22, 0x22, 0x22)).all(-1)
    rows = [after[top : top + 7, 110:710].sum(1) for top in (88, 142)]
    assert [set(row) for row in rows] == [{151}, {600}]
    assert not before[88, 110:710].any()
    # The frame is the expected step: of it the label has its percents.
    frame = (picture == (0xCC, 0xCC, 0xCC)).all(-1)
    assert np.flatnonzero(frame[64]).max() == 110 + 300
    orange = (picture == (0xB9, 0x61, 0x1B)).all(-1)
    assert np.flatnonzero(orange[64 + 54 + 1]).max() == 110 + 300


def test_a_picture_says_what_its_figures_are(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "fdg_keras.plans.draw", lambda *args: drawn.append(args)
    )
    found = plan_of(0.1, 0.2, step_s=0.2, whole_s=0.3)
    found.plot()
    first, last = (
        dataclasses.replace(stage, measured_s=0.4, sends_s=0.02)
        for stage in found.stages
    )
    dataclasses.replace(found, stages=(first, last), measured_step_s=0.5).plot()
    (title, legend, bars, whole), after = drawn
    assert title.endswith("200 ms expected")
    assert "black" not in legend
    assert "grey" not in legend
    assert [bar.text[:5].strip() for bar in bars] == ["50 %", "100 %"]
    assert whole == after[3] == 0.2
    assert after[0].endswith("200 ms expected, 500 ms measured")
    assert "grey: handing over, black: measured, frame: expected" in after[1]
    assert [bar.text[:4].strip() for bar in after[2]] == ["40 %", "90 %"]
    assert sum(after[2][0].parts) == pytest.approx(0.1)
