"""When stages ran which pass: a few ticks of it, as a picture; a trace.

What is drawn comes from `StageStatistics.passes`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fdg_keras.probes import KEPT
from fdg_keras.statistics import Pass

#: One for each batch, in turn, alike for its forward and its backwards.
COLOURS = (
    "#3f68a8",
    "#b9611b",
    "#3d7d45",
    "#b53a3e",
    "#2b7d7a",
    "#82528e",
    "#876a12",
    "#6d5246",
)

# In pixels.
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 1200, 190, 30, 92, 72, 56
_INK, _GREY, _PAPER = "#222222", "#767676", "#ffffff"


@dataclass(frozen=True)
class Window:
    """What stages did for a few ticks.

    Attributes:
        length: In milliseconds.
        rows: For each stage its passes in that time; their times are
            milliseconds from the begin of the window, within it.
    """

    length: float
    rows: list[list[Pass]]


def steady_window(
    stages: Sequence[Sequence[Pass]], ticks: int = 8
) -> Window | None:
    """Returns the last ticks before the first stage has run all its forwards.

    After them stages only drain. With few batches it is the first ticks.

    Args:
        stages: The passes of each, in the order in which they ended.
        ticks: How many, as the last stage counts them.

    Returns:
        `None` if no stage ran anything.
    """
    if not all(stages):
        return None
    forwards = [[p for p in passes if p.kind == "F"] for passes in stages]
    since = _complete_since(stages)
    until = min(passes[-1].ends for passes in forwards)
    last = max(passes[-1].ends for passes in stages)
    ends = [p.ends for p in forwards[-1]]
    length = max(last - since, 0.0)  # The clock may be set back.
    if len(ends) > 1:
        gaps = [b - a for a, b in itertools.pairwise(ends)]
        length = min(length, ticks * float(np.median(gaps)))
    begin = max(since, min(until, last) - length)
    end = begin + length
    rows = [
        [
            _with_times(p, lambda t: 1e3 * (min(max(t, begin), end) - begin))
            for p in passes
            if p.waits < end and p.ends > begin
        ]
        for passes in stages
    ]
    return Window(1e3 * length, rows)


def _complete_since(stages: Sequence[Sequence[Pass]]) -> float:
    """Returns since when no pass of any stage is missing."""
    missing = []
    for passes in stages:
        for kind in "FB":
            waits = [p.waits for p in passes if p.kind == kind]
            if len(waits) >= KEPT:
                missing.append(waits[0])
    return max(missing or [min(passes[0].waits for passes in stages)])


def _with_times(one: Pass, change: Callable[[float], Any]) -> Pass:
    return Pass(*one[:2], *(change(time) for time in one[2:]))


def axis(begin: float, end: float) -> list[float]:
    """Returns round numbers from `begin` to `end`, three to seven of them."""
    length = end - begin
    if not length > 0:
        return [begin]
    power = 10.0 ** math.floor(math.log10(length / 6))
    step = next(f * power for f in (1, 2, 5, 10) if length < 7 * f * power)
    first, last = math.ceil(begin / step), math.floor(end / step)
    return [float(f"{i * step:.9g}") for i in range(first, last + 1)]


# -- A picture -----------------------------------------------------------------


def draw(window: Window, names: Sequence[str], title: str) -> Image.Image:
    """Draws a row for each stage, and an axis.

    Args:
        window: What to draw.
        names: A line for each stage, beside its row.
        title: A line above.

    Returns:
        An RGB image, 1200 pixels wide.
    """
    foot = _TOP + len(window.rows) * _ROW
    image = Image.new("RGB", (_WIDTH, foot + _BOTTOM), _PAPER)
    hatched = _hatched(image.size)
    pen = ImageDraw.Draw(image)
    pen.text((24, 18), title, _INK, _font(26))
    _draw_legend(pen, image, hatched)
    scale = (_WIDTH - _LEFT - _RIGHT) / (window.length or 1.0)
    for at in axis(0.0, window.length):
        x = _LEFT + at * scale
        pen.line((x, _TOP, x, foot + 8), "#e2e2e2")
        pen.text((x, foot + 12), f"{at:g}", _GREY, _font(19), anchor="mt")
    pen.text((24, foot + 12), "milliseconds", _GREY, _font(19), anchor="lt")
    for k, (name, row) in enumerate(zip(names, window.rows)):
        top = _TOP + k * _ROW
        pen.text((24, top + 12), f"stage {k}", _INK, _font(22))
        pen.text((24, top + 40), name, _GREY, _font(16))
        for one in row:
            waits, starts, ends = (int(_LEFT + t * scale) for t in one[2:])
            area = (waits, top + 8, starts, top + _ROW - 8)
            if starts > waits:
                image.paste(hatched.crop(area), area)
            _draw_pass(pen, one, (starts, area[1], ends, area[3]))
    return image


def _draw_pass(pen: ImageDraw.ImageDraw, one: Pass, area: Any) -> None:
    x, top, end, bottom = area
    if end <= x:
        return
    colour = COLOURS[one.batch % len(COLOURS)]
    fill, ink = (
        (_lighter(colour), _INK) if one.kind == "F" else (colour, "white")
    )
    pen.rectangle((x, top, end - 1, bottom), fill, colour, 1)
    text = f"{one.kind}{one.batch}"
    for size in (22, 18, 14):
        if pen.textlength(text, _font(size)) < end - x - 4:
            middle = ((x + end) / 2, (top + bottom) / 2)
            pen.text(middle, text, ink, _font(size), anchor="mm")
            return


def _draw_legend(
    pen: ImageDraw.ImageDraw, image: Image.Image, hatched: Image.Image
) -> None:
    x = 24
    for kind, text in (
        ("F", "forward"),
        ("B", "backward and update (the number is the batch)"),
        ("", "waiting (blank: neither)"),
    ):
        area = (x, 56, x + 34, 78)
        if kind:
            _draw_pass(pen, Pass(kind, 0, 0, 0, 0), area)
        else:
            image.paste(hatched.crop(area), area)
        pen.text((x + 44, 67), text, _GREY, _font(19), anchor="lm")
        x += 44 + int(pen.textlength(text, _font(19))) + 34


def _hatched(size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "#f6f6f6")
    pen = ImageDraw.Draw(image)
    width, height = size
    for x in range(0, width + height, 9):
        pen.line((x, 0, x - height, height), "#c4c4c4")
    return image


def _lighter(colour: str) -> tuple[int, ...]:
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return tuple(round(255 - 0.3 * (255 - c)) for c in channels)


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


# -- A trace -------------------------------------------------------------------


def trace(
    stages: Sequence[Sequence[Pass]], devices: Sequence[str]
) -> dict[str, Any]:
    """Returns the passes for `chrome://tracing` or Perfetto.

    Args:
        stages: The passes of each.
        devices: Full TensorFlow names: machines are processes, stages threads.

    Returns:
        An object of the trace event format, to be written as JSON: slices for
        passes and waiting, arrows for what is handed on, counters for what
        waits in the links.
    """
    zero = min((p.waits for passes in stages for p in passes), default=0.0)
    # Microseconds, as whole numbers: slices must not overlap by a rounding.
    stages = [
        [_with_times(p, lambda t: round(1e6 * (t - zero))) for p in passes]
        for passes in stages
    ]
    machines = [device.partition("/device:")[0] for device in devices]
    of_machine = {name: i for i, name in enumerate(dict.fromkeys(machines))}
    events: list[dict] = [
        {"ph": "M", "name": "process_name", "pid": i, "args": {"name": name}}
        for name, i in of_machine.items()
    ]
    for k, (passes, device) in enumerate(zip(stages, devices)):
        name = f"stage {k} on {device.rpartition('/device:')[2]}"
        where = {"pid": of_machine[machines[k]], "tid": k}
        events += [
            {"ph": "M", "name": what, "args": {key: value}} | where
            for what, key, value in (
                ("thread_name", "name", name),
                ("thread_sort_index", "sort_index", k),
            )
        ]
        events += [slice_ | where for p in passes for slice_ in _slices(p)]
    for i, (k, sent, to, taken) in enumerate(_hand_offs(stages)):
        # It is sent before the pass has ended, which updates weights last.
        at = max(sent.starts, min(sent.ends, taken.starts) - 1)
        what = {"cat": "hand-off", "id": i, "name": sent.kind}
        pids = of_machine[machines[k]], of_machine[machines[to]]
        events += [
            {"ph": "s", "pid": pids[0], "tid": k, "ts": at} | what,
            {"ph": "f", "pid": pids[1], "tid": to, "ts": taken.starts}
            | {"bp": "e", **what},
        ]
    events += [
        {"ph": "C", "name": name, "pid": of_machine[machines[to]], "ts": time}
        | {"args": {"batches": count}}
        for name, to, time, count in _in_links(stages)
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _slices(one: Pass) -> Iterable[dict[str, Any]]:
    for category, name, begin, end in (
        ("wait", f"wait for {one.kind}{one.batch}", one.waits, one.starts),
        ("pass", f"{one.kind}{one.batch}", one.starts, one.ends),
    ):
        if end > begin or category == "pass":
            yield {
                "ph": "X",
                "name": name,
                "cat": category,
                "ts": begin,
                # The clock may be set back.
                "dur": max(end - begin, 0),
                "args": {"batch": one.batch},
            }


def _hand_offs(
    stages: Sequence[Sequence[Pass]],
) -> Iterable[tuple[int, Pass, int, Pass]]:
    """Yields stage and pass that send, stage and pass that receive."""
    found = {
        (k, p.kind, p.batch): p
        for k, passes in enumerate(stages)
        for p in passes
    }
    for (k, kind, batch), sent in found.items():
        to = k + 1 if kind == "F" else k - 1
        taken = found.get((to, kind, batch))
        if taken is not None:
            yield k, sent, to, taken


def _in_links(
    stages: Sequence[Sequence[Pass]],
) -> Iterable[tuple[str, int, float, int]]:
    """Yields link, its consumer, time, and how many batches wait in it."""
    changes: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for k, sent, to, taken in _hand_offs(stages):
        what = "activations" if sent.kind == "F" else "gradients"
        link = changes.setdefault((f"{what} {k} to {to}", to), [])
        link += [(min(sent.ends, taken.starts), 1), (taken.starts, -1)]
    for (name, to), times in changes.items():
        count = 0
        # Sent before taken, where both are at the same time.
        for time, change in sorted(times, key=lambda t: (t[0], -t[1])):
            count += change
            yield name, to, time, count
