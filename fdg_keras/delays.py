"""The arithmetic of delays: who is how late, and who runs what when.

Pure functions on integers; everything here is checked against literal tables.

Symbols, as in "Fully Decoupled Neural Network Learning Using Delayed
Gradients" (Zhuang et al., IEEE TNNLS 2021, arXiv 1906.09108):

    K       number of stages (`splits`), stage k = 0 ... K-1
            (the paper's module k+1)
    d_k     delay of stage k in batches, `delay * (K - 1 - k)`
    F(b)    forward of batch b
    B(b)    backward and update of batch b

At tick t a stage runs F(t) and then, once t >= d_k, B(t - d_k). With
`order="update_first"` it runs B before F. After the last tick it drains: the
d_k backwards that are still due, in batch order.
"""

from typing import Literal, NamedTuple

Order = Literal["forward_first", "update_first"]
ORDERS = ("forward_first", "update_first")


class Turns(NamedTuple):
    """How many ticks of each kind a stage runs, in this order.

    Attributes:
        fill: Ticks that only run a forward (the pipeline fills).
        steady: Ticks that run a forward and a backward.
        drain: Ticks that only run a backward (the pipeline drains).
    """

    fill: int
    steady: int
    drain: int


def stage_delay(stage: int, splits: int, delay: int) -> int:
    """Returns d_k, by how many batches stage `stage` runs B after F.

    Equation: `d_k = delay * (K - 1 - k)`; with `delay=2` this is the paper's
    `2 (K - k)` for modules counted from 1.
    """
    return delay * (splits - 1 - stage)


def staleness(stage: int, splits: int, delay: int, order: Order) -> int:
    """Returns how many updates a stage makes between F(b) and B(b).

    It is d_k for `"forward_first"`, and one less for `"update_first"`, where
    the update of a tick comes before its forward.
    """
    late = stage_delay(stage, splits, delay)
    return max(late - 1, 0) if order == "update_first" else late


def in_flight(stage: int, splits: int, delay: int, order: Order) -> int:
    """Returns how many batches a stage keeps at most, from F(b) to B(b).

    It is d_k + 1 for `"forward_first"`, between F and B of a tick. For
    `"update_first"` it is d_k, but 1 without a delay.
    """
    late = stage_delay(stage, splits, delay)
    return max(late, 1) if order == "update_first" else late + 1


def link_capacity(delay: int) -> int:
    """Returns the capacity of a link, in batches, in either direction.

    Stage k waits for the gradient of batch t - d_k before it starts tick
    t + 1, so it leads stage k+1 by at most `delay + 1` batches: a link of this
    capacity never blocks a stage needlessly, and memory cannot grow.
    """
    return delay + 1


def fed_ahead(stage: int, splits: int, delay: int) -> int:
    """Returns how many batches of inputs wait for a stage at most.

    Stage 0 runs d_0 - d_k batches ahead of stage k. Beside them the batches
    of two parts of a window are fed, one that is run and one that waits (see
    `feeding`): two batches, unless several are run within a tenth of a second.
    """
    ahead = stage_delay(0, splits, delay) - stage_delay(stage, splits, delay)
    return ahead + 2


def turns(start: int, stop: int, late: int, last: bool) -> Turns:
    """Splits the ticks `start <= t < stop` of one stage into kinds.

    Args:
        start: First tick of the window, counted from the start of the epoch.
        stop: Tick after the last one of the window.
        late: The stage's delay d_k.
        last: Whether the stream ends after this window, so that the stage
            drains.

    Returns:
        `Turns`: those with `t < d_k` fill, the others are steady, and after
        the last window the `min(stop, d_k)` outstanding backwards follow.
    """
    filled = min(max(late, start), stop)
    return Turns(filled - start, stop - filled, min(stop, late) if last else 0)


def windows_ahead(splits: int, delay: int, window: int) -> int:
    """Returns how many windows may be announced and not yet be finished.

    While the last stage runs tick t, stage 0 may run tick t + d_0. So many
    ticks must be announced to keep it busy, and one window more hides the
    time that announcing takes. Without delay nothing runs ahead: a window is
    announced when the one before has ended, as in `keras.Model.fit`.

    Args:
        splits: K.
        delay: Batches of delay per hop.
        window: Ticks of a window.
    """
    late = stage_delay(0, splits, delay)
    return -(-late // window) + 2 if late else 1


def timeline(
    splits: int, delay: int, ticks: int, order: Order = "forward_first"
) -> list[list[str]]:
    """Returns what every stage runs at every tick.

    Ticks are each stage's own: in wall time stage k runs behind stage k-1,
    never in step with it.

    Returns:
        `rows[t][k]`, for example `"F4 B0"`.
    """
    rows = []
    for tick in range(ticks):
        row = []
        for stage in range(splits):
            late = stage_delay(stage, splits, delay)
            work = [f"F{tick}"]
            if tick >= late:
                first = order == "update_first" and late > 0
                work.insert(0 if first else 1, f"B{tick - late}")
            row.append(" ".join(work))
        rows.append(row)
    return rows


def format_timeline(
    splits: int, delay: int, ticks: int, order: Order = "forward_first"
) -> str:
    """Returns `timeline` as a text table, a line for each tick."""
    header = ["tick"] + [
        f"stage {k} (d={stage_delay(k, splits, delay)})" for k in range(splits)
    ]
    body = timeline(splits, delay, ticks, order)
    rows = [header] + [[str(t), *row] for t, row in enumerate(body)]
    widths = [max(len(row[i]) for row in rows) for i in range(splits + 1)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
