"""Draws the timeline of the README: `docs/timeline.svg`.

    python scripts/draw_timeline.py

The schedule comes from `fdg_keras.delays`; what is drawn is when each stage
runs it if all passes take equally long and hand-offs take no time.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fdg_keras.delays import timeline  # noqa: E402 (found by the line above)

SPLITS, DELAY, TICKS = 3, 2, 12
BOX, ROW, LEFT, TOP = 44, 46, 132, 34
# One colour for each batch, alike for its forwards and backwards.
COLOURS = [
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#76b7b2",
    "#b07aa1",
    "#edc948",
    "#9c755f",
]


def schedule() -> list[list[tuple[int, str]]]:
    """Returns for each stage its passes and when they start."""
    passes = [
        [
            work
            for row in timeline(SPLITS, DELAY, TICKS)
            for work in row[k].split()
        ]
        for k in range(SPLITS)
    ]
    begun: dict[tuple[str, int], int] = {}
    at = [0] * SPLITS  # index of each stage's next pass
    free = [0] * SPLITS  # when each stage is free
    progressed = True
    while progressed:
        progressed = False
        for k in range(SPLITS):
            while at[k] < len(passes[k]):
                work = passes[k][at[k]]
                source = (work, k - 1 if work[0] == "F" else k + 1)
                needs = 0 <= source[1] < SPLITS
                if needs and source not in begun:
                    break
                ready = begun[source] + 1 if needs else 0
                begun[work, k] = max(free[k], ready)
                free[k] = begun[work, k] + 1
                at[k] += 1
                progressed = True
    return [
        [(begun[w, k], w) for w in passes[k] if (w, k) in begun]
        for k in range(SPLITS)
    ]


def draw() -> str:
    """Returns the picture as SVG."""
    stages = schedule()
    ticks = 13
    width, height = LEFT + ticks * BOX + 16, TOP + SPLITS * ROW + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} '
        f'{height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" fill="#444">Three stages, each busy with '
        "its own batch: F forward, B backward and update</text>",
    ]
    for k, passes in enumerate(stages):
        y = TOP + k * ROW
        late = DELAY * (SPLITS - 1 - k)
        parts.append(
            f'<text x="12" y="{y + 20}" fill="#222">stage {k}</text>'
            f'<text x="12" y="{y + 36}" fill="#777" font-size="11">'
            f"{late} batches late</text>"
        )
        for start, work in passes:
            if start >= ticks:
                continue
            x = LEFT + start * BOX
            colour = COLOURS[int(work[1:]) % len(COLOURS)]
            forward = work[0] == "F"
            style = (
                f'fill="{colour}" fill-opacity="0.28" stroke="{colour}"'
                if forward
                else f'fill="{colour}" stroke="{colour}"'
            )
            ink = "#222" if forward else "white"
            parts.append(
                f'<rect x="{x + 2}" y="{y + 4}" width="{BOX - 4}" '
                f'height="{ROW - 8}" rx="4" {style}/>'
                f'<text x="{x + BOX / 2}" y="{y + 28}" text-anchor="middle" '
                f'fill="{ink}">{work}</text>'
            )
    y = TOP + SPLITS * ROW + 22
    parts.append(
        f'<text x="{LEFT}" y="{y}" fill="#777" font-size="12">time &#8594; '
        "(the number is the batch; no stage waits for a whole forward or "
        "backward pass)</text></svg>"
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = ROOT / "docs" / "timeline.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(draw())
    print(target)
