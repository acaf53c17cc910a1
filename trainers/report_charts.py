"""Tables and charts of the reports: HTML and SVG, in the page's colours."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fdg_keras.statistics import Pass
from fdg_keras.timelines import COLOURS, Window, axis

#: What a stage does with its time: in the record, on the page, its colour.
SHARES = (
    ("computing", "computing", "#7ba3d0"),
    ("waiting_for_activations", "waiting for activations", "#f2b35e"),
    ("waiting_for_gradients", "waiting for gradients", "#e8797b"),
    ("idle", "idle", "#b5b5b5"),
)


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[int] = ()
) -> str:
    """Returns a table.

    Args:
        head: Titles of the columns.
        rows: Cells; `None` is shown as a dash.
        left: Columns that are text, not numbers.
    """

    def row(tag: str, cells: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=left' if i in left else ''}>"
            f"{'-' if cell is None else escape(str(cell))}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return (
        f"<div class=wide><table><tr>{row('th', head)}</tr>{body}</table></div>"
    )


def keys(colours: Iterable[tuple[str, str]]) -> str:
    """Returns what colours stand for."""
    return "".join(
        f'<span class=key><i style="background:{colour}"></i>'
        f"{escape(text)}</span>"
        for text, colour in colours
    )


def timeline(window: Window, names: Sequence[str]) -> str:
    """Returns a picture with a row for each stage, as SVG."""
    left, right, row, width = 150, 12, 46, 1024
    foot = len(window.rows) * row + 6
    scale = (width - left - right) / (window.length or 1.0)
    parts = [
        f'<svg viewBox="0 0 {width} {foot + 30}" role=img '
        'aria-label="Timeline"><defs><pattern id=hatch width=7 height=7 '
        'patternUnits=userSpaceOnUse patternTransform="rotate(45)"><rect '
        'width=7 height=7 fill="var(--wait)"/><path d="M0 0V7" '
        'stroke="var(--hatch)" stroke-width=2 /></pattern></defs>'
    ]
    for at in axis(0.0, window.length):
        x = left + at * scale
        parts.append(
            f'<path class=rule d="M{x:.1f} 0V{foot}"/><text class=grey '
            f'x="{x:.1f}" y="{foot + 18}" text-anchor=middle>{at:g}</text>'
        )
    parts.append(f"<text class=grey x=0 y={foot + 18}>milliseconds</text>")
    for k, (name, passes) in enumerate(zip(names, window.rows)):
        y = k * row + 6
        parts.append(
            f'<text x=0 y="{y + 16}">stage {k}</text><text class=grey x=0 '
            f'y="{y + 32}">{escape(name)}</text>'
        )
        for one in passes:
            waits, starts, ends = (left + t * scale for t in one[2:])
            if starts > waits:
                parts.append(
                    f'<rect x="{waits:.1f}" y="{y}" height="{row - 8}" '
                    f'width="{starts - waits:.1f}" fill="url(#hatch)"/>'
                )
            parts.append(_box(one, starts, y, ends - starts, row - 8))
    return "".join(parts) + "</svg>"


def _box(one: Pass, x: float, y: float, width: float, height: float) -> str:
    colour = COLOURS[one.batch % len(COLOURS)]
    forward = one.kind == "F"
    text = f"{one.kind}{one.batch}"
    label = ""
    if width > 8 * len(text):
        ink = "" if forward else ' style="fill:#fff"'
        label = (
            f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4}" '
            f"text-anchor=middle{ink}>{text}</text>"
        )
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{max(width - 1, 0.5):.1f}" '
        f'height="{height}" rx=2 fill="{colour}" stroke="{colour}" '
        f'fill-opacity="{0.3 if forward else 1}"><title>{text}: '
        f"{one.ends - one.starts:.3g} ms</title></rect>{label}"
    )


def bars(stages: Sequence[dict[str, Any]]) -> str:
    """Returns a bar for each stage: what it does with its time, as SVG."""
    left, width, row = 80, 1024, 34
    parts = [
        f'<svg viewBox="0 0 {width} {len(stages) * row}" role=img '
        'aria-label="Parts of the time of each stage">'
    ]
    for k, stage in enumerate(stages):
        x, y = float(left), k * row
        parts.append(f"<text x=0 y={y + 18}>stage {k}</text>")
        for name, text, colour in SHARES:
            part = stage[name] * (width - left)
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{part:.1f}" '
                f'height="{row - 8}" fill="{colour}"><title>{text}: '
                f"{stage[name]:.1%}</title></rect>"
            )
            if part > 44:
                parts.append(
                    f'<text x="{x + part / 2:.1f}" y="{y + 18}" '
                    f'text-anchor=middle style="fill:#111">{stage[name]:.1%}'
                    "</text>"
                )
            x += part
    return "".join(parts) + "</svg>"


def curves(name: str, lines: dict[str, dict[int, float]]) -> str:
    """Returns curves over epochs, as SVG.

    Args:
        name: What they show.
        lines: For each curve its values by epoch, counted from 1.
    """
    epochs = [e for values in lines.values() for e in values]
    numbers = [v for values in lines.values() for v in values.values()]
    first, last, low, high = (
        min(epochs),
        max(epochs),
        min(numbers),
        max(numbers),
    )
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def x_of(epoch: float) -> float:
        return 56 + 424 * (epoch - first) / (last - first or 1)

    def y_of(value: float) -> float:
        return 10 + 182 * (high - value) / (high - low)

    parts = [
        f'<svg viewBox="0 0 500 220" role=img aria-label="{escape(name)}">'
    ]
    for value in axis(low, high):
        y = y_of(value)
        parts.append(
            f'<path class=rule d="M56 {y:.1f}H480"/><text class=grey x=48 '
            f'y="{y + 4:.1f}" text-anchor=end>{value:g}</text>'
        )
    for epoch in axis(first, last):
        if epoch == int(epoch):
            parts.append(
                f'<text class=grey x="{x_of(epoch):.1f}" y=212 '
                f"text-anchor=middle>{epoch:g}</text>"
            )
    for values, colour in zip(lines.values(), COLOURS):
        points = [(x_of(e), y_of(v)) for e, v in sorted(values.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill=none stroke="{colour}" '
            "stroke-width=2 />"
        )
        # A line of one point cannot be seen.
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r=2.5 fill="{colour}"/>'
            for x, y in points
        ]
    return (
        f"<figure><b>{escape(name)}</b>{''.join(parts)}</svg><figcaption>"
        f"{keys(zip(lines, COLOURS))}</figcaption></figure>"
    )
