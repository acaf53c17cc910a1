"""Bars of a plan, drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# In pixels.
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BAR, _THIN = 900, 110, 190, 64, 54, 30, 6
_INK, _GREY, _FRAME, _PAPER = "#222222", "#767676", "#cccccc", "#ffffff"
_COLOURS = ("#3f68a8", "#b9611b", "#9a9a9a")


@dataclass(frozen=True)
class Bar:
    """One stage.

    Attributes:
        name: Stands before it.
        parts: Lengths of its parts, up to three.
        seen: Length of the thin bar at its foot, if there is one.
        text: Stands behind it.
        span: Stands beneath it.
    """

    name: str
    parts: Sequence[float]
    seen: float | None
    text: str
    span: str


def draw(
    title: str, legend: str, bars: Sequence[Bar], whole: float
) -> Image.Image:
    """Draws bars below each other.

    Args:
        title: In the first line.
        legend: In the second.
        bars: One or more.
        whole: Length of the frame around each, above 0. A bar that is longer
            leaves it.
    """
    longest = max(whole, *(max(sum(b.parts), b.seen or 0.0) for b in bars))
    picture = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(bars) + 10), _PAPER)
    pen = ImageDraw.Draw(picture)
    small, large = ImageFont.load_default(13), ImageFont.load_default(16)
    full = _WIDTH - _LEFT - _RIGHT
    scale = full / longest
    pen.text((_LEFT, 12), title, _INK, large)
    pen.text((_LEFT, 36), legend, _GREY, small)
    for k, bar in enumerate(bars):
        top = _TOP + k * _ROW
        foot = top + _BAR
        pen.text((12, top + 6), bar.name, _INK, small)
        pen.rectangle((_LEFT, top, _LEFT + scale * whole, foot), None, _FRAME)
        left = float(_LEFT)
        for length, colour in zip(bar.parts, _COLOURS):
            right = left + scale * length
            pen.rectangle((left, top, right, foot), colour)
            left = right
        if bar.seen is not None:
            right = _LEFT + scale * bar.seen
            pen.rectangle((_LEFT, foot - _THIN, right, foot), _INK)
        pen.text((_LEFT + full + 12, top + 6), bar.text, _INK, small)
        pen.text((_LEFT, foot + 2), bar.span[:90], _GREY, small)
    return picture
