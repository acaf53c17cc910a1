"""Pictures and traces of passes that are known."""

import itertools
import json
import re

import numpy as np
import pytest

from fdg_keras import delays, timelines
from fdg_keras.probes import KEPT
from fdg_keras.statistics import Pass
from fdg_keras.timelines import axis, draw, steady_window, trace

HERE = "/job:localhost/replica:0/task:0/device:CPU:"


def make_passes(splits, batches, delay=2, tick=0.010, zero=1e9):
    """Passes of stages that each take half a tick for an F and for a B.

    A stage begins a pass when it has what it needs; all are kept, as the ring
    of a probe does, of the last `KEPT` batches only.
    """
    todo = []
    for k in range(splits):
        late = delays.stage_delay(k, splits, delay)
        rows = delays.timeline(splits, delay, batches)
        work = [w for row in rows for w in row[k].split()]
        work += [f"B{b}" for b in range(batches)[-late:] if late]
        todo.append([(w[0], int(w[1:])) for w in work])
    free, ended = [zero] * splits, {}
    stages = [[] for _ in range(splits)]
    while any(todo):
        for k in range(splits):
            if not todo[k]:
                continue
            kind, batch = todo[k][0]
            source = (kind, batch, k - 1 if kind == "F" else k + 1)
            if 0 <= source[2] < splits and source not in ended:
                continue
            starts = max(free[k], ended.get(source, zero))
            one = Pass(kind, batch, free[k], starts, starts + tick / 2)
            free[k] = ended[kind, batch, k] = one.ends
            todo[k].pop(0)
            if batch >= batches - KEPT:
                stages[k].append(one)
    return stages


# -- What is shown -------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_a_window_shows_the_last_ticks_before_stages_drain(splits):
    stages = make_passes(splits, 50)
    window = steady_window(stages, ticks=8)
    assert window.length == pytest.approx(80)
    assert len(window.rows) == splits
    # The first stage has just run its last forward.
    forwards = [p for p in window.rows[0] if p.kind == "F"]
    assert forwards[-1].batch == 49
    assert forwards[-1].ends == pytest.approx(80)
    for row in window.rows:
        assert 7 <= sum(p.kind == "F" for p in row) <= 9
        assert 7 <= sum(p.kind == "B" for p in row) <= 9
        for p in row:
            assert 0 <= p.waits <= p.starts <= p.ends <= window.length + 1e-9


def test_a_window_has_no_holes():
    """Of the passes that the ring has lost nothing is shown as waiting."""
    for splits in range(2, 8):
        stages = make_passes(splits, 100)
        window = steady_window(stages)
        for row in window.rows:
            for before, after in itertools.pairwise(row):
                assert after.waits == pytest.approx(before.ends, abs=1e-3)
            assert row[0].waits == 0


def test_few_batches_are_shown_from_the_begin():
    stages = make_passes(3, 4)
    window = steady_window(stages)
    assert [f"{p.kind}{p.batch}" for p in window.rows[2]][:2] == ["F0", "B0"]
    assert window.rows[0][0].waits == 0
    assert window.length <= 80 + 1e-9


def test_one_batch():
    window = steady_window(make_passes(2, 1))
    assert [len(row) for row in window.rows] == [2, 2]
    assert window.length == pytest.approx(20)


def test_nothing_ran():
    assert steady_window([[], []]) is None


@pytest.mark.parametrize(
    ("begin", "end", "wanted"),
    [
        (0, 80, [0, 20, 40, 60, 80]),
        (0, 0.0123, [0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012]),
        (0, 7, [0, 2, 4, 6]),
        (0.93, 1.27, [0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.25]),
        (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
        (5, 5, [5]),
        (1, 300, [50, 100, 150, 200, 250, 300]),
    ],
)
def test_axis(begin, end, wanted):
    assert axis(begin, end) == wanted


# -- Pictures ------------------------------------------------------------------


def test_a_picture():
    window = steady_window(make_passes(4, 50))
    image = draw(window, ["CPU:0"] * 4, "80 ms")
    assert image.mode == "RGB"
    assert image.width == 1200
    pixels = np.asarray(image)
    # A row for each stage, busy with several batches.
    colours = {
        tuple(int(c[i : i + 2], 16) for i in (1, 3, 5))
        for c in timelines.COLOURS
    }
    found = {tuple(p) for p in pixels[::4, ::4].reshape(-1, 3).tolist()}
    assert colours <= found
    shorter = draw(window, ["CPU:0"] * 2, "80 ms")
    assert shorter.height == image.height
    two = timelines.Window(window.length, window.rows[:2])
    assert draw(two, ["CPU:0"] * 2, "80 ms").height < image.height


def test_waiting_is_hatched():
    waited = Pass("F", 0, 0.0, 50.0, 60.0)
    at_once = Pass("F", 0, 50.0, 50.0, 60.0)
    a, b = (
        np.asarray(draw(timelines.Window(60.0, [[p]]), [""], ""))
        for p in (waited, at_once)
    )
    changed = np.nonzero((a != b).any(axis=2))
    scale = (1200 - 190 - 30) / 60
    assert changed[1].min() >= 190
    assert changed[1].max() <= 190 + 50 * scale


# -- Traces --------------------------------------------------------------------


def test_a_trace():
    stages = make_passes(3, 12)
    found = trace(stages, [f"{HERE}{k}" for k in range(3)])
    assert json.loads(json.dumps(found)) == found
    assert found["displayTimeUnit"] == "ms"
    events = found["traceEvents"]
    by_kind = {kind: [e for e in events if e["ph"] == kind] for kind in "MXsfC"}
    assert sum(map(len, by_kind.values())) == len(events)

    names = {e["tid"]: e["args"]["name"] for e in by_kind["M"][1::2]}
    assert names == {k: f"stage {k} on CPU:{k}" for k in range(3)}
    passes = [e for e in by_kind["X"] if e["cat"] == "pass"]
    assert len(passes) == 2 * 12 * 3
    assert all(e["dur"] == 5000 for e in passes)
    assert min(e["ts"] for e in by_kind["X"]) == 0
    for k in range(3):
        slices = [e for e in by_kind["X"] if e["tid"] == k]
        for before, after in itertools.pairwise(slices):
            assert before["ts"] + before["dur"] == after["ts"]


def test_arrows_go_from_pass_to_pass():
    stages = make_passes(3, 12)
    events = trace(stages, [f"{HERE}{k}" for k in range(3)])["traceEvents"]
    passes = [e for e in events if e.get("cat") == "pass"]

    def enclosing(event):
        (found,) = (
            e
            for e in passes
            if e["tid"] == event["tid"]
            and e["ts"] <= event["ts"] < e["ts"] + e["dur"]
        )
        return found

    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    stops = {e["id"]: e for e in events if e["ph"] == "f"}
    # Forwards and backwards of 12 batches, over two cuts.
    assert starts.keys() == stops.keys() == set(range(2 * 12 * 2))
    for i, start in starts.items():
        sent, taken = enclosing(start), enclosing(stops[i])
        assert sent["name"] == taken["name"]
        step = 1 if sent["name"][0] == "F" else -1
        assert taken["tid"] - sent["tid"] == step
        assert start["ts"] <= stops[i]["ts"]
        assert stops[i]["bp"] == "e"


def test_counters_are_what_waits_in_links():
    events = trace(make_passes(2, 40), [f"{HERE}0", f"{HERE}1"])["traceEvents"]
    counters = [e for e in events if e["ph"] == "C"]
    assert {e["name"] for e in counters} == {
        "activations 0 to 1",
        "gradients 1 to 0",
    }
    counts = [e["args"]["batches"] for e in counters]
    assert min(counts) == 0
    assert 1 <= max(counts) <= delays.link_capacity(2)
    for name in {e["name"] for e in counters}:
        assert [e for e in counters if e["name"] == name][-1]["args"] == {
            "batches": 0
        }


def test_machines_are_processes():
    devices = [
        f"/job:worker/replica:0/task:{i}/device:CPU:0" for i in (0, 1, 1)
    ]
    events = trace(make_passes(3, 4), devices)["traceEvents"]
    names = [e for e in events if e["name"] == "process_name"]
    assert [(e["pid"], e["args"]["name"]) for e in names] == [
        (0, "/job:worker/replica:0/task:0"),
        (1, "/job:worker/replica:0/task:1"),
    ]
    places = {(e["tid"], e["pid"]) for e in events if e["ph"] == "X"}
    assert places == {(0, 0), (1, 1), (2, 1)}


def test_a_clock_that_is_set_back_does_no_harm():
    """`tf.timestamp` is that of the wall."""
    stages = make_passes(2, 6)
    late = [p._replace(ends=p.ends - 3600) for p in stages[1][-4:]]
    stages[1][-4:] = late
    assert steady_window(stages) is not None
    events = trace(stages, [f"{HERE}0", f"{HERE}1"])["traceEvents"]
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
    draw(steady_window(stages), ["", ""], "")


def test_nothing_to_trace():
    events = trace([[], []], [f"{HERE}0", f"{HERE}1"])["traceEvents"]
    assert {e["ph"] for e in events} == {"M"}
    assert re.search("stage 1", json.dumps(events))
