"""The simulation against closed forms and a naive recurrence."""

import itertools
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_keras.delays import ORDERS
from fdg_keras.resources import ALLOCATED, Cable, Cost, peak_bytes
from fdg_keras.schedules import FLUSHES, Delayed, Flushed
from fdg_keras.simulation import simulate

approx = pytest.approx
EQUAL = [Cost(1.0, 2.0)] * 4  # Three seconds a batch and stage.


def seconds(*arguments, **more):
    return simulate(*arguments, **more).seconds_per_step


# -- Closed forms -------------------------------------------------------------


@pytest.mark.parametrize("delay", [1, 2, 3])
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_equal_stages_never_wait(splits, delay):
    result = simulate([Cost(1.0, 2.0)] * splits, schedule=Delayed(delay))
    assert result.seconds_per_step == approx(3.0)
    assert result.steps_per_s == approx(1 / 3)
    for stage in result.stages:
        assert stage.computing == approx(1.0)


def test_the_slowest_stage_sets_the_pace():
    costs = [Cost(1.0, 2.0), Cost(2.0, 5.0), Cost(0.5, 0.5)]
    result = simulate(costs)
    assert result.seconds_per_step == approx(7.0)
    computing = [stage.computing for stage in result.stages]
    assert computing == approx([3 / 7, 1.0, 1 / 7])
    # It is behind a link that is full, and its gradients come late.
    first, _, last = result.stages
    assert first.waiting_gradients + first.blocked == approx(4 / 7)
    assert last.waiting_activations == approx(6 / 7)


def test_locked_stages_take_turns():
    costs = [Cost(1.0, 2.0), Cost(2.0, 5.0), Cost(0.5, 0.5)]
    cables = [Cable(10.0, 0.25), Cable(latency_s=0.125)]
    sending = [Cost(c.forward_s, c.backward_s, 5.0, 10.0) for c in costs]
    assert seconds(costs, schedule=Delayed(0)) == approx(11.0)
    # Two hops over each cable.
    expected = 11.0 + (0.5 + 1.0 + 2 * 0.25) + 2 * 0.125
    found = simulate(sending, cables, Delayed(0))
    assert found.seconds_per_step == approx(expected)
    assert found.stages[1].computing == approx(7.0 / expected)


@pytest.mark.parametrize("order", FLUSHES)
@pytest.mark.parametrize(("splits", "count"), [(1, 4), (2, 8), (4, 8), (8, 3)])
def test_the_bubble_of_micro_batches(splits, count, order):
    """GPipe's (K-1) / (M+K-1); 1F1B has the same."""
    costs = [Cost(1.0, 2.0)] * splits
    result = simulate(costs, schedule=Flushed(count, order))
    assert result.seconds_per_step == approx(3 * (count + splits - 1) / count)
    for stage in result.stages:
        assert 1 - stage.computing == approx(
            (splits - 1) / (count + splits - 1)
        )


def test_overhead_is_of_each_pass():
    costs = [Cost(1.0, 2.0)]
    assert seconds(costs, overhead_s=0.5) == approx(4.0)
    eight = seconds(costs, schedule=Flushed(8), overhead_s=0.5)
    assert eight == approx(3.0 + 16 * 0.5)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_slow_link_sets_the_pace(delay, backward):
    sends = {"gradient_sends" if backward else "sends": 50.0}
    costs = [Cost(1.0, 2.0, **sends)] * 3
    result = simulate(costs, Cable(bytes_per_s=10.0), Delayed(delay))
    if delay == 1:  # Nothing is hidden: a hop's way there and back.
        assert result.seconds_per_step > 5.0
    else:
        assert result.seconds_per_step == approx(5.0)
        assert result.stages[0].computing == approx(3 / 5)


def slowest_circle(costs, latency, delay, order):
    """Returns seconds per tick that delayed gradients allow.

    The activations of batch s go from stage k through those up to k + m. There
    the backward of that tick follows, of an earlier batch. Its gradients come
    back to stage k at its tick s + m * delay, and its forward of the tick
    after that has to wait for them. So m * delay + 1 ticks take at least as
    long as all passes and transfers on this way; m = 0 is the stage alone.

    With `"update_first"` the last stage has its backward after its forward
    all the same, and stage k waits with the forward of the same tick.
    """
    slowest = 0.0
    for first in range(len(costs)):
        for last in range(first, len(costs)):
            way = costs[first : last + 1]
            hops = last - first
            work = sum(cost.forward_s + cost.backward_s for cost in way)
            ticks = hops * delay + 1
            if order == "update_first" and hops and last == len(costs) - 1:
                ticks -= bool(delay)
            slowest = max(slowest, (work + 2 * hops * latency) / ticks)
    return slowest


@settings(deadline=None)
@given(
    st.lists(
        st.builds(Cost, st.floats(0.1, 5.0), st.floats(0.1, 5.0)),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.0, 20.0),
    st.integers(0, 3),
    st.sampled_from(ORDERS),
)
def test_the_slowest_circle_sets_the_pace(costs, latency, delay, order):
    found = seconds(costs, Cable(latency_s=latency), Delayed(delay, order))
    expected = slowest_circle(costs, latency, delay, order)
    assert found == approx(expected, rel=0.02)


def test_a_delay_hides_latency():
    """Of equal stages: all but `2 * latency / delay` of it."""
    for delay in (1, 2, 3):
        hidden = 3.0 * (delay - 1) / 2
        cable = Cable(latency_s=hidden)
        assert seconds(EQUAL, cable, Delayed(delay)) == approx(3.0)
        cable = Cable(latency_s=hidden + 1.0)
        assert seconds(EQUAL, cable, Delayed(delay)) > 3.2


def test_more_delay_tolerates_more_jitter():
    times = [
        seconds([Cost(1.0, 2.0)] * 8, schedule=Delayed(delay), jitter=0.3)
        for delay in range(5)
    ]
    assert times == sorted(times, reverse=True)
    assert times[0] == approx(24.0, rel=0.05)
    assert times[1] / times[2] > 1.05
    assert 3.0 < times[4] < times[2]


def test_jitter_keeps_the_mean_and_has_the_deviation():
    found = [
        seconds([Cost(1.0, 0.0)], jitter=0.5, seed=seed, batches=1)
        for seed in range(2000)
    ]
    assert np.mean(found) == approx(1.0, abs=0.05)
    assert np.std(found) == approx(0.5, rel=0.1)


def test_gradients_that_piled_up_do_not_promise_too_much():
    """The first stages are faster for long, until they have used them up."""
    costs = [Cost(1.0, 2.0)] * 32
    costs[20] = Cost(1.0, 2.1)
    assert seconds(costs) == approx(3.1)


def test_links_that_are_full_block():
    """K=2: stage 0 could run ahead while it fills, and cannot send."""
    costs = [Cost(1.0, 0.0), Cost(10.0, 0.0)]
    result = simulate(costs, schedule=Delayed(4), capacity=2)
    assert result.seconds_per_step == approx(10.0)
    assert result.stages[0].blocked == approx(0.9)
    assert result.stages[0].waiting_gradients == approx(0.0)


# -- Devices that are shared ---------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_one_core_does_all_the_work(delay):
    costs = [Cost(1.0, 2.0), Cost(2.0, 5.0), Cost(0.5, 0.5)]
    result = simulate(costs, schedule=Delayed(delay), devices=1)
    assert result.seconds_per_step == approx(11.0, rel=0.02)


def test_two_cores_share_four_stages():
    result = simulate(EQUAL, devices=1, cores=2)
    assert result.seconds_per_step == approx(6.0, rel=0.01)
    for stage in result.stages:
        assert stage.computing == approx(0.5, rel=0.05)
    assert any(stage.waiting_processor > 0.1 for stage in result.stages)


def test_two_devices_get_stages_in_turn():
    costs = [Cost(float(f), 0.0) for f in (1, 2, 3, 4, 5)]
    found = seconds(costs, devices=2, batches=200)
    assert found == approx(1.0 + 3.0 + 5.0, rel=0.01)


def test_as_many_cores_as_stages_are_devices_without_cables():
    costs = [Cost(1.0, 2.0, 9.0, 9.0), Cost(2.0, 2.0, 9.0, 9.0), Cost(1.0, 1.0)]
    shared = simulate(costs, Cable(1.0), devices=1, cores=3)
    assert shared == simulate(costs)


# -- A naive recurrence -------------------------------------------------------


def passes(schedule, splits, ticks):
    """Returns for each stage all its passes as `(kind, unit)`."""
    return [
        [
            one
            for tick in range(ticks)
            for one in schedule.tick(stage, splits, tick)
        ]
        for stage in range(splits)
    ]


class Naive:
    """Times by kind, stage and unit; whoever could start first is next.

    `work[k]` are the passes of stage k, `takes[kind][k]` their seconds,
    `sends[kind][k]` those of a transfer from stage k.
    """

    def __init__(self, work, takes, sends, latency, capacity, hosts, cores):
        self.work, self.takes, self.sends = work, takes, sends
        self.latency, self.capacity = latency, capacity
        self.start, self.end, self.sent, self.left = {}, {}, {}, {}
        free = {host: [0.0] * cores for host in hosts}
        at = [0] * len(work)
        while True:
            self.send_all()
            could = [
                (ready, k)
                for k in range(len(work))
                if at[k] < len(work[k])
                and (ready := self.ready(k, at[k])) is not None
            ]
            if not could:
                break
            ready, k = min(could)
            kind, unit = work[k][at[k]]
            core = min(range(cores), key=lambda c: free[hosts[k]][c])
            start = max(ready, free[hosts[k]][core])
            self.start[kind, k, unit] = start
            self.end[kind, k, unit] = start + takes[kind][k]
            free[hosts[k]][core] = start + takes[kind][k]
            at[k] += 1
        self.at = at

    def reader(self, kind, k):
        return k + 1 if kind == "F" else k - 1

    def send_all(self):
        """Whatever has been made is sent once its place is free."""
        for kind, k, unit in [key for key in self.end if key not in self.sent]:
            end = self.end[kind, k, unit]
            to = self.reader(kind, k)
            if not 0 <= to < len(self.work):
                self.sent[kind, k, unit] = end
                continue
            place = (kind, to, unit - self.capacity)
            if unit >= self.capacity:
                if place not in self.start:
                    continue
                end = max(end, self.start[place])
            self.sent[kind, k, unit] = end
            begin = max(end, self.left.get((kind, k, unit - 1), 0.0))
            self.left[kind, k, unit] = begin + self.sends[kind][k]

    def ready(self, k, i):
        """Returns when the i-th pass of stage k can start, or `None`."""
        kind, unit = self.work[k][i]
        ready = 0.0
        if i:
            before = (self.work[k][i - 1][0], k, self.work[k][i - 1][1])
            if before not in self.sent:
                return None
            ready = self.sent[before]
        source = k - 1 if kind == "F" else k + 1
        if 0 <= source < len(self.work):
            if (kind, source, unit) not in self.left:
                return None
            came = self.left[kind, source, unit] + self.latency
            ready = max(ready, came)
        return ready


whole = st.integers(0, 6).map(float)


@st.composite
def cases(draw):
    """Draws costs, cable, schedule, capacity, devices, cores."""
    splits = draw(st.integers(1, 4))
    costs = [
        Cost(draw(whole) + 1, draw(whole), draw(whole), draw(whole))
        for _ in range(splits)
    ]
    cable = Cable(draw(st.sampled_from([1.0, 2.0, math.inf])), draw(whole))
    schedule = draw(
        st.one_of(
            st.builds(Delayed, st.integers(0, 3), st.sampled_from(ORDERS)),
            st.builds(
                Flushed, st.sampled_from([1, 2, 4]), st.sampled_from(FLUSHES)
            ),
        )
    )
    room = draw(st.one_of(st.none(), st.integers(1, 4)))
    devices = draw(st.integers(1, splits))
    return costs, cable, schedule, room, devices, draw(st.integers(1, 3))


@settings(deadline=None)
@given(cases(), st.integers(1, 12))
def test_against_a_naive_recurrence(case, batches):
    costs, cable, schedule, room, devices, cores = case
    splits, parts = len(costs), schedule.micro_batches
    measured = 2 * schedule.fill(splits) + 1
    speed = math.inf if devices == 1 else cable.bytes_per_s
    work = passes(schedule, splits, measured + batches)
    oracle = Naive(
        work=work,
        takes={
            "F": [c.forward_s / parts for c in costs],
            "B": [c.backward_s / parts for c in costs],
        },
        sends={
            "F": [c.sends / parts / speed for c in costs],
            "B": [c.gradient_sends / parts / speed for c in costs],
        },
        latency=0.0 if devices == 1 else cable.latency_s,
        capacity=room or schedule.capacity,
        hosts=[k % devices for k in range(splits)],
        cores=cores,
    )
    arguments = (costs, cable, schedule)
    more = {
        "capacity": room,
        "devices": devices,
        "cores": cores,
        "batches": batches,
    }
    if oracle.at[0] < len(work[0]):
        with pytest.raises(ValueError, match=r"wait for each other"):
            simulate(*arguments, **more)
        return
    result = simulate(*arguments, **more)
    assert result.passes == sum(oracle.at)
    before = passes(schedule, splits, measured)
    lengths = []
    for k, stage in enumerate(result.stages):
        if oracle.at[k] < len(work[k]):  # Full links, once stage 0 has ended.
            assert k
            assert room
            continue
        (kind, unit), (last, to) = before[k][-1], work[k][-1]
        begin, end = oracle.sent[kind, k, unit], oracle.sent[last, k, to]
        lengths.append(end - begin)
        computed = sum(
            oracle.takes[kind][k] for kind, _ in work[k][len(before[k]) :]
        )
        assert stage.computing == approx(computed / (end - begin))
        shares = [
            stage.computing,
            stage.waiting_activations,
            stage.waiting_gradients,
            stage.waiting_processor,
            stage.blocked,
        ]
        assert sum(shares) == approx(1.0)
        assert min(shares) >= -1e-9
    assert result.seconds_per_step == approx(max(lengths) / batches)


# -- Many stages --------------------------------------------------------------


def test_passes_grow_with_the_stages_and_their_delay_only():
    """Two in each of 2 * d_0 ticks and of those measured, at most.

    So a thousand stages, which would take too long here, are 8.6 million.
    """
    splits, batches = 200, 10
    result = simulate([Cost(1.0, 2.0)] * splits, batches=batches)
    assert result.seconds_per_step == approx(3.0)
    ticks = 2 * 2 * (splits - 1) + 1 + batches
    assert result.passes <= 2 * splits * ticks


def test_two_runs_are_the_same():
    costs = [Cost(1.0, 2.0), Cost(2.0, 5.0), Cost(0.5, 0.5)]
    one, same, other = (
        simulate(costs, Cable(9.0), jitter=0.2, seed=seed, devices=devices)
        for seed, devices in ((1, 2), (1, 2), (2, 2))
    )
    assert one == same
    assert one != other


# -- Memory -------------------------------------------------------------------

#: Of three stages: what each keeps, and the weights.
HEAVY = [
    Cost(
        1.0,
        2.0,
        sends=10.0,
        gradient_sends=7.0,
        stash=100.0,
        inputs=5.0,
        weights=1000.0,
        slots=2000.0,
    )
] * 3


def test_memory_of_delayed_gradients():
    links = [3 * 7.0, 3 * (10.0 + 7.0), 3 * 10.0]
    always = [4000.0 + link for link in links]
    flights = [5, 3, 1]
    for stash, kept in (
        ("exact", [n * 100.0 + (n - 1) * 1000.0 for n in flights]),
        ("current", [n * 100.0 for n in flights]),
        ("replay", [n * 5.0 + 100.0 for n in flights]),
    ):
        expected = [ALLOCATED * (a + k) for a, k in zip(always, kept)]
        result = simulate(HEAVY, stash=stash)
        assert [s.peak_bytes for s in result.stages] == approx(expected)
        assert peak_bytes(HEAVY, stash=stash) == approx(expected)


def test_memory_of_micro_batches():
    gpipe = peak_bytes(HEAVY, Flushed(4))
    expected = np.array([4100 + 7.0, 4100 + 17.0, 4100 + 10.0])
    assert gpipe == approx(ALLOCATED * expected)
    eager = peak_bytes(HEAVY, Flushed(4, "1f1b"))
    expected = np.array([4075 + 7.0, 4050 + 17.0, 4025 + 10.0])
    assert eager == approx(ALLOCATED * expected)


def test_replay_runs_the_forward_again():
    assert seconds(EQUAL, stash="replay") == approx(4.0)


# -- Bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [-1.0, math.nan, math.inf, 1e308, "1", None, True]
)
def test_bad_cost(value):
    message = r"Expected `backward_s` to be .* Received: backward_s="
    with pytest.raises(ValueError, match=message):
        Cost(1.0, value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, None])
def test_bad_bandwidth(value):
    message = r"Expected `bytes_per_s` to be above 0.*Received: bytes_per_s="
    with pytest.raises(ValueError, match=message):
        Cable(value)


@pytest.mark.parametrize("value", [5e-324, 1e-101, True, "1", 1j])
def test_bandwidths_beyond_reason(value):
    with pytest.raises(ValueError, match=r"above 0, 1e-100 at least\. Rec"):
        Cable(value)
    slow = simulate(EQUAL, Cable(1e-100), batches=3)
    assert math.isfinite(slow.seconds_per_step)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int8])
def test_numbers_of_short_types(kind):
    cost = Cost(kind(1), kind(2), sends=kind(10))
    cable = Cable(kind(9), kind(1))
    found = simulate([cost] * 3, cable, overhead_s=kind(1), batches=3000)
    same = simulate(
        [Cost(1.0, 2.0, sends=10.0)] * 3,
        Cable(9.0, 1.0),
        overhead_s=1.0,
        batches=3000,
    )
    assert found == same


def test_bad_latency():
    message = r"Expected `latency_s` to be seconds.* Received: latency_s=-1"
    with pytest.raises(ValueError, match=message):
        Cable(latency_s=-1)


def test_no_stages():
    message = r"Expected `costs` to have .* one or more.*Received: costs=\[\]"
    with pytest.raises(ValueError, match=message):
        simulate([])


@pytest.mark.parametrize(
    "costs",
    [["a", "b"], [1.0, 2.0], "ab", None, Cost(1.0, 2.0), np.array([1.0])],
)
def test_costs_that_are_none(costs):
    message = r"Expected `costs` to have a `Cost` .*Received: costs="
    with pytest.raises(ValueError, match=message):
        simulate(costs)
    with pytest.raises(ValueError, match=message):
        simulate(cost for cost in EQUAL)


@pytest.mark.parametrize("cables", [None, [1, 2, 3], "abc", 1e9, iter([])])
def test_cables_that_are_none(cables):
    message = r"Expected `cables` to be one `Cable` .*Received: cables="
    with pytest.raises(ValueError, match=message):
        simulate(EQUAL, cables)


@pytest.mark.parametrize("schedule", ["fdg", Delayed, None, 2])
def test_schedules_that_are_none(schedule):
    message = r"Expected `schedule` to be one such as .*Received: schedule="
    with pytest.raises(ValueError, match=message):
        simulate(EQUAL, Cable(), schedule)


def test_cables_that_are_too_many():
    message = r"each of the 3 cuts between 4 stages\. Received: 4 of them"
    with pytest.raises(ValueError, match=message):
        simulate(EQUAL, [Cable()] * 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stash", "most"),
        ("overhead_s", -0.1),
        ("jitter", -0.1),
        ("jitter", math.nan),
        ("jitter", 1e200),
        ("seed", -1),
        ("seed", "a"),
        ("seed", 0.5),
        ("devices", 0),
        ("cores", 0),
        ("cores", 1.5),
        ("capacity", 0),
        ("batches", 0),
    ],
)
def test_bad_settings(name, value):
    message = rf"Expected `{name}` to be .*Received: {name}="
    with pytest.raises(ValueError, match=message):
        simulate(EQUAL, **{name: value})


def test_links_that_are_too_small():
    message = (
        r"Expected links with enough room.* wait for each other in a circle\. "
        r"Received: capacity=1"
    )
    with pytest.raises(ValueError, match=message):
        simulate(EQUAL[:2], schedule=Delayed(4), capacity=1)


def test_links_of_the_default_size_are_always_large_enough():
    for delay, order, splits in itertools.product(range(4), ORDERS, (1, 2, 5)):
        costs = [Cost(float(k), 1.0) for k in range(splits)]
        simulate(costs, schedule=Delayed(delay, order), batches=3)


# -- The script ----------------------------------------------------------------

WRONG = """
import sys
sys.path.insert(0, "scripts")
import simulate
from absl import app, flags
for wrong in sys.argv[1:]:
    for name in simulate.FLAGS:
        simulate.FLAGS[name].unparse()  # back to its default
    try:
        simulate.FLAGS(["simulate", "--model=resnet20", *wrong.split()])
        simulate.main(["simulate"])
    except (flags.Error, app.UsageError):
        print("refused", wrong)
    else:
        print("computed", wrong)
"""


def test_the_script_refuses_what_cannot_be_simulated(tmp_path):
    """In words, before it computes."""
    (tmp_path / "file").write_text("")
    wrong = [
        "--splits=0",
        "--splits=5000",
        "--splits=2,x",
        "--seed=-1 --jitter=0.1",
        "--jitter=nan",
        "--jitter=1e150",
        "--gbit_per_s=1e-200",
        "--overhead_us=1e200",
        "--latency_us=inf",
        "--operations_per_s=inf",
        "--gbit_per_s=nan",
        f"--plot={tmp_path}",
        f"--plot={tmp_path}/file/picture.svg",
    ]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", WRONG, *wrong],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    found = [w for w in wrong if f"refused {w}" in done.stdout.splitlines()]
    assert found == wrong
