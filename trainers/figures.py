"""Plots of test errors, as SVG that stands alone."""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fdg_keras.timelines import COLOURS, axis

#: Points `(x, y)` of a curve.
Points = Sequence[tuple[float, float]]

# In pixels: the picture, and the area of the curves in it.
_WIDTH, _LEFT, _RIGHT, _TOP, _FOOT = 800, 64, 780, 16, 400


def by_epochs(results: Sequence[dict[str, Any]]) -> Points:
    """Returns test errors after each epoch, medians of some runs.

    Args:
        results: One or more, see `processes`.
    """
    errors = _medians(result["test_error"] for result in results)
    return list(enumerate(errors, 1))


def by_time(results: Sequence[dict[str, Any]]) -> Points:
    """Returns the same after so many seconds of training, compiling included.

    Args:
        results: One or more, see `processes`.
    """
    seconds = _medians(
        itertools.accumulate(result["seconds"]) for result in results
    )
    errors = _medians(result["test_error"] for result in results)
    return list(zip(seconds, errors))


def draw(curves: Mapping[str, Points], x_name: str, y_name: str) -> str:
    """Returns a plot.

    Args:
        curves: By their names, one or more, in the order of the legend.
        x_name: Stands below the axis.
        y_name: Stands beside it.
    """
    points = [point for curve in curves.values() for point in curve]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    height = _FOOT + 64 + 22 * len(curves)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_RIGHT - _LEFT) * (x - first) / (last - first or 1.0),
            _TOP + (_FOOT - _TOP) * (high - y) / (high - low),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} '
        f'{height}" width="{_WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for value in axis(low, high):
        _, y = place(first, value)
        parts += [
            f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="#e2e2e2"/>',
            _text(_LEFT - 8, y + 4, f"{value:g}", "end"),
        ]
    for value in axis(first, last):
        x, _ = place(value, low)
        parts.append(_text(x, _FOOT + 20, f"{value:g}", "middle"))
    parts += [
        _text((_LEFT + _RIGHT) / 2, _FOOT + 44, x_name, "middle"),
        f'<g transform="translate(16 {(_TOP + _FOOT) / 2}) rotate(-90)">'
        f"{_text(0, 0, y_name, 'middle')}</g>",
    ]
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(*at)) for at in curve)
        y = _FOOT + 70 + 22 * index
        line = f'fill="none" stroke="{colour}" stroke-width="2"'
        if index >= len(COLOURS):  # Colours come again.
            line += ' stroke-dasharray="6 3"'
        if len(curve) == 1:  # A line of one point is not seen.
            x, y0 = place(*curve[0])
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y0:.1f}" r="4" fill="{colour}"/>'
            )
        parts += [
            f'<polyline points="{path}" {line}/>',
            f'<path d="M{_LEFT} {y}h28" {line}/>',
            _text(_LEFT + 40, y + 4, name, "start"),
        ]
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#444">'
        f"{escape(text)}</text>"
    )


def _medians(series: Iterable[Iterable[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*series)]
