"""The arithmetic of delays, against literal tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_keras import delays
from fdg_keras.delays import Turns

orders = st.sampled_from(delays.ORDERS)


@st.composite
def stages(draw):
    """Draws `(stage, splits, delay)`."""
    splits = draw(st.integers(1, 6))
    return draw(st.integers(0, splits - 1)), splits, draw(st.integers(0, 4))


# -- Tables -------------------------------------------------------------------


def test_forward_first_is_the_figure_of_the_paper():
    """The table of README: K=3, delay=2."""
    assert delays.timeline(3, 2, 5) == [
        ["F0", "F0", "F0 B0"],
        ["F1", "F1", "F1 B1"],
        ["F2", "F2 B0", "F2 B2"],
        ["F3", "F3 B1", "F3 B3"],
        ["F4 B0", "F4 B2", "F4 B4"],
    ]


def test_update_first_swaps_all_but_the_last_stage():
    """The last stage cannot: its gradient is that of its own forward."""
    assert delays.timeline(3, 2, 5, "update_first") == [
        ["F0", "F0", "F0 B0"],
        ["F1", "F1", "F1 B1"],
        ["F2", "B0 F2", "F2 B2"],
        ["F3", "B1 F3", "F3 B3"],
        ["B0 F4", "B2 F4", "F4 B4"],
    ]


def test_without_delay_every_stage_does_the_same():
    assert delays.timeline(2, 0, 2) == [["F0 B0"] * 2, ["F1 B1"] * 2]


def test_one_batch_of_delay_per_hop():
    assert delays.timeline(3, 1, 3) == [
        ["F0", "F0", "F0 B0"],
        ["F1", "F1 B0", "F1 B1"],
        ["F2 B0", "F2 B1", "F2 B2"],
    ]


def test_table_to_print():
    assert delays.format_timeline(3, 2, 5) == (
        "tick  stage 0 (d=4)  stage 1 (d=2)  stage 2 (d=0)\n"
        "0     F0             F0             F0 B0\n"
        "1     F1             F1             F1 B1\n"
        "2     F2             F2 B0          F2 B2\n"
        "3     F3             F3 B1          F3 B3\n"
        "4     F4 B0          F4 B2          F4 B4"
    )


@pytest.mark.parametrize(
    ("splits", "delay", "expected"),
    [
        (1, 2, [0]),
        (3, 0, [0, 0, 0]),
        (3, 1, [2, 1, 0]),
        (4, 2, [6, 4, 2, 0]),
        (3, 3, [6, 3, 0]),
    ],
)
def test_stage_delays(splits, delay, expected):
    found = [delays.stage_delay(k, splits, delay) for k in range(splits)]
    assert found == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [("forward_first", [4, 2, 0]), ("update_first", [3, 1, 0])],
)
def test_staleness(order, expected):
    assert [delays.staleness(k, 3, 2, order) for k in range(3)] == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [("forward_first", [5, 3, 1]), ("update_first", [4, 2, 1])],
)
def test_batches_in_flight(order, expected):
    assert [delays.in_flight(k, 3, 2, order) for k in range(3)] == expected
    assert delays.in_flight(0, 3, 0, order) == 1


@pytest.mark.parametrize(
    ("start", "stop", "late", "last", "expected"),
    [
        (0, 10, 4, True, Turns(fill=4, steady=6, drain=4)),
        (0, 10, 4, False, Turns(4, 6, 0)),
        (0, 10, 0, True, Turns(0, 10, 0)),
        (3, 5, 4, False, Turns(1, 1, 0)),
        (0, 4, 4, False, Turns(4, 0, 0)),
        (4, 8, 4, True, Turns(0, 4, 4)),
        # Fewer batches than the delay: some stages never reach the steady
        # part, and still owe a backward for every forward.
        (0, 3, 4, True, Turns(3, 0, 3)),
        # The window that only says that the stream has ended.
        (9, 9, 4, True, Turns(0, 0, 4)),
        (2, 2, 4, True, Turns(0, 0, 2)),
        (0, 0, 4, True, Turns(0, 0, 0)),
    ],
)
def test_turns(start, stop, late, last, expected):
    assert delays.turns(start, stop, late, last) == expected


@pytest.mark.parametrize(
    ("splits", "delay", "window", "expected"),
    [
        (1, 2, 1, 1),
        (4, 0, 8, 1),
        (2, 1, 1, 3),
        (3, 2, 1, 6),
        (3, 2, 4, 3),
        (3, 2, 3, 4),
        (3, 2, 100, 3),
    ],
)
def test_windows_ahead(splits, delay, window, expected):
    assert delays.windows_ahead(splits, delay, window) == expected


@pytest.mark.parametrize(("delay", "capacity"), [(0, 1), (1, 2), (2, 3)])
def test_link_capacity(delay, capacity):
    assert delays.link_capacity(delay) == capacity


# -- Properties ---------------------------------------------------------------


def run_stage(windows, late, order):
    """Returns what a stage does over windows, e.g. `[("F", 0), ("B", 0)]`."""
    events = []
    forwards = backwards = start = 0
    for i, ticks in enumerate(windows):
        last = i == len(windows) - 1
        turns = delays.turns(start, start + ticks, late, last)
        start += ticks
        for kind in ["F"] * turns.fill + ["FB"] * turns.steady:
            both = "FB" if order == "forward_first" or not late else "BF"
            for step in both if kind == "FB" else kind:
                if step == "F":
                    events.append(("F", forwards))
                    forwards += 1
                else:
                    events.append(("B", backwards))
                    backwards += 1
        for _ in range(turns.drain):
            events.append(("B", backwards))
            backwards += 1
    return events


windows_of_a_stream = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(windows_of_a_stream, stages(), orders)
def test_every_batch_gets_one_forward_and_one_backward(windows, stage, order):
    events = run_stage(windows, delays.stage_delay(*stage), order)
    batches = list(range(sum(windows)))
    assert [b for kind, b in events if kind == "F"] == batches
    assert [b for kind, b in events if kind == "B"] == batches


@given(windows_of_a_stream, stages(), orders)
def test_backward_comes_as_late_as_the_delay_says(windows, stage, order):
    late = delays.stage_delay(*stage)
    events = run_stage(windows, late, order)
    total = sum(windows)
    for batch in range(total):
        at = events.index(("B", batch))
        before = sum(kind == "F" for kind, _ in events[:at])
        ahead = 0 if order == "update_first" and late else 1
        # Only the drain, which has no forwards left, comes earlier than d_k.
        assert before == min(batch + late + ahead, total)
        assert events.index(("F", batch)) < at


@given(windows_of_a_stream, stages(), orders)
def test_staleness_counts_updates_between_forward_and_backward(
    windows, stage, order
):
    events = run_stage(windows, delays.stage_delay(*stage), order)
    stale = delays.staleness(*stage, order)
    for batch in range(sum(windows)):
        forward, backward = (
            events.index(("F", batch)),
            events.index(("B", batch)),
        )
        updates = sum(kind == "B" for kind, _ in events[forward:backward])
        # At the start there are fewer batches to be late by.
        assert updates == min(stale, batch)


@given(windows_of_a_stream, stages(), orders)
def test_no_stage_keeps_more_than_the_batches_in_flight(windows, stage, order):
    events = run_stage(windows, delays.stage_delay(*stage), order)
    kept = [
        sum(1 if kind == "F" else -1 for kind, _ in events[: i + 1])
        for i in range(len(events))
    ]
    most = delays.in_flight(*stage, order)
    assert max(kept, default=0) == min(most, sum(windows))


@given(windows_of_a_stream, stages())
def test_splitting_a_stream_into_windows_changes_nothing(windows, stage):
    late = delays.stage_delay(*stage)
    whole = run_stage([sum(windows)], late, "forward_first")
    assert run_stage(windows, late, "forward_first") == whole


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 40), orders)
def test_timeline_agrees_with_turns(splits, delay, ticks, order):
    rows = delays.timeline(splits, delay, ticks, order)
    for k in range(splits):
        late = delays.stage_delay(k, splits, delay)
        events = [
            (step[0], int(step[1:])) for row in rows for step in row[k].split()
        ]
        drain = delays.turns(0, ticks, late, last=True).drain
        expected = run_stage([ticks], late, order)
        assert events == expected[: len(expected) - drain]


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 20))
def test_enough_windows_are_announced_to_keep_stage_0_busy(
    splits, delay, window
):
    """Stage 0 runs d_0 ticks ahead of a window that the last stage is in."""
    ahead = delays.windows_ahead(splits, delay, window)
    late = delays.stage_delay(0, splits, delay)
    assert ahead * window >= late + window
    # Not many more: a callback's learning rate waits for what is announced.
    assert (ahead - 3) * window < late


class Network:
    """All stages with bounded links, in any timing.

    A step runs when what it reads is there and its link has room.
    """

    def __init__(self, splits, delay, ticks, order, capacity):
        self.capacity = capacity
        self.steps = [
            run_stage([ticks], delays.stage_delay(k, splits, delay), order)
            for k in range(splits)
        ]
        self.done = {"F": [0] * splits, "B": [0] * splits}

    def waiting(self, k):
        """How many activations wait between stages k and k + 1."""
        return self.done["F"][k] - self.done["F"][k + 1]

    def can_step(self, k):
        if not self.steps[k]:
            return False
        kind, batch = self.steps[k][0]
        done, last = self.done[kind], len(self.steps) - 1
        source, sink = (k - 1, k + 1) if kind == "F" else (k + 1, k - 1)
        if 0 <= source <= last and done[source] <= batch:
            return False
        return not 0 <= sink <= last or batch - done[sink] < self.capacity

    def step(self, k):
        kind, _ = self.steps[k].pop(0)
        self.done[kind][k] += 1


networks = st.tuples(
    st.integers(2, 5), st.integers(0, 3), st.integers(1, 15), orders
)


@given(networks, st.randoms(use_true_random=False))
def test_links_of_this_capacity_never_deadlock(network, chance):
    """Every batch gets through, whichever stage is the slow one."""
    _, delay, _, _ = network
    stages = Network(*network, capacity=delays.link_capacity(delay))
    while ready := [k for k in range(len(stages.steps)) if stages.can_step(k)]:
        stages.step(chance.choice(ready))
    assert not any(stages.steps)


@given(networks, st.data())
def test_a_full_link_only_holds_a_stage_up_that_fills(network, data):
    """Beyond its first d_k ticks a stage never leads by more than capacity."""
    splits, delay, _, _ = network
    k = data.draw(st.integers(0, splits - 2))
    late = delays.stage_delay(k, splits, delay)
    stages = Network(*network, capacity=10**6)
    # Stage k + 1 and all behind it run only when nothing else can.
    while ready := [j for j in range(splits) if stages.can_step(j)]:
        stages.step(ready[0])
        if stages.done["F"][k] > late + 1:
            assert stages.waiting(k) <= delays.link_capacity(delay)
