"""Makes a page of a run that `fdg_keras.callbacks.PipelineMonitor` watched.

    python -m trainers.report runs/train-20250101-120000

Looks for `pipeline.json` in the folder and all those below it, and writes
`report.html` beside each: the plan, a timeline of a few ticks, who waits for
whom, loss and accuracy over the epochs, staleness, settings and versions. The
page needs nothing else, neither files nor a network.

Expected: a second or two (TensorFlow is imported), and the path of each page.
"""

import csv
import html
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from absl import app

from fdg_keras.records import write
from fdg_keras.statistics import Pass
from fdg_keras.timelines import steady_window
from trainers import report_charts as charts

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2129;
  --grey: #6a7280; --line: #e3e6ea; --wait: #eceef1; --hatch: #c3c8cf; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c;
  --ink: #e6e8eb; --grey: #969eaa; --line: #2c323a; --wait: #20252c;
  --hatch: #454d58; } }
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); margin: 0 auto;
  max-width: 1080px; padding: 24px 28px 64px;
  font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; margin: 8px 0 2px; }
h2 { font-size: 18px; margin: 40px 0 10px; padding-top: 14px;
  border-top: 1px solid var(--line); }
p { margin: 4px 0 10px; max-width: 75ch; }
.grey, figcaption { color: var(--grey); }
figure { margin: 0; } figcaption { font-size: 13px; }
.wide { overflow-x: auto; }
.two { display: grid; gap: 12px 32px;
  grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 12px 4px 0; white-space: nowrap; }
th { color: var(--grey); font-weight: 500;
  border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
.left { text-align: left; }
td.left + td.left { white-space: normal; overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, Arial, sans-serif; }
svg .grey { fill: var(--grey); } svg .rule { stroke: var(--line); }
.key { display: inline-flex; align-items: center; gap: 6px;
  margin-right: 18px; font-size: 13px; color: var(--grey); }
.key i { width: 12px; height: 12px; border-radius: 2px; }
"""


# -- What there is ------------------------------------------------------------


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns all `pipeline.json` in a folder and below it.

    Raises:
        ValueError: If there is none.
    """
    found = sorted(folder.rglob("pipeline.json")) if folder.is_dir() else []
    if not found:
        raise ValueError(
            "Expected a folder with a pipeline.json in it or below it, which "
            "`fdg_keras.callbacks.PipelineMonitor(DIR)` writes after each "
            "epoch: train with it among the callbacks, then name its folder. "
            f"Received: {str(folder)!r}"
        )
    return found


def read_history(run: dict[str, Any], csv_file: pathlib.Path | None) -> dict:
    """Returns values by name and epoch, the epochs counted from 1.

    Args:
        run: What `pipeline.json` holds; its logs come first.
        csv_file: Read if it has none.
    """
    rows = [{"epoch": e["epoch"] + 1, **e["logs"]} for e in run["epochs"]]
    if not any(e["logs"] for e in run["epochs"]) and csv_file:
        with csv_file.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            # A value may be an array, or null if it was not finite.
            if name != "epoch" and isinstance(value, (int, float, str)):
                found.setdefault(name, {})[int(row["epoch"])] = float(value)
    return found


def nearest(
    path: pathlib.Path, root: pathlib.Path, name: str
) -> pathlib.Path | None:
    """Returns the file `name` in the closest folder, from `path` to `root`."""
    for folder in path.parents:
        if (folder / name).exists():
            return folder / name
        if folder == root:
            break
    return None


# -- The page -----------------------------------------------------------------


def make_page(path: pathlib.Path, root: pathlib.Path) -> str:
    """Returns the page of a run.

    Args:
        path: Its `pipeline.json`.
        root: Up to this folder `config.json` and `history.csv` are looked for.
    """
    run = json.loads(path.read_text(encoding="utf-8"))
    config = nearest(path, root, "config.json")
    settings = dict(run["settings"])
    versions = dict(run["versions"])
    if config:
        part = json.loads(config.read_text(encoding="utf-8"))[-1]
        settings |= part["settings"]
        versions |= part["versions"]
    history = read_history(run, nearest(path, root, "history.csv"))
    name = html.escape(str(settings.get("model", path.parent.name)))
    count, epochs = len(run["plan"]), len(run["epochs"])
    subtitle = f"{count} stages, {epochs} epochs"
    if "delay" in settings:
        subtitle += f", delay {settings['delay']}"
    sections = [
        ("Plan", _plan(run)),
        *_times(run),
        ("Over the epochs", _history(history)),
        ("Settings and versions", _pairs(settings, versions)),
    ]
    body = "".join(
        f"<h2>{title}</h2>{content}" for title, content in sections if content
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f'content="width=device-width"><title>{name}</title><style>{_STYLE}'
        f"</style><h1>{name}</h1><p class=grey>{subtitle}</p>{body}</html>"
    )


def _plan(run: dict[str, Any]) -> str:
    head = (
        *("stage", "device", "from", "to"),
        *("layers", "parameters", "work", "sends for a sample"),
    )
    rows = [
        (
            *(one[n] for n in ("stage", "device", "from", "to")),
            len(one["layers"]),
            f"{one['parameters']:,}",
            f"{one['work']:.0%}",
            None if one is run["plan"][-1] else f"{one['sends']:,}",
        )
        for one in run["plan"]
    ]
    return charts.table(head, rows, left=(1, 2, 3))


def _times(run: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yields titles and contents of what is about the stages' time."""
    if run["emulated"]:
        yield (
            "Stages",
            "<p>This run was emulated: one device ran all stages, one after "
            "the other. So no stage has times of its own.</p>",
        )
        return
    epoch = run["epochs"][-1]
    stages = epoch["stages"]
    window = steady_window([[Pass(*p) for p in one] for one in run["passes"]])
    if window is not None:
        names = [one["device"] for one in run["plan"]]
        yield (
            f"{_ms(window.length)} ms of epoch {epoch['epoch'] + 1}",
            charts.timeline(window, names)
            + "<figcaption>F: forward, B: backward and update; the number is "
            "the batch. Hatched: waiting. Blank: nothing was announced, or no "
            "processor was free.</figcaption>",
        )
    slowest = max(stages, key=lambda one: one["computing"])
    yield (
        "Who waits for whom",
        f"<p>Stage {slowest['stage']} sets the pace: it computes "
        f"{slowest['computing']:.1%} of its time, at "
        f"{_ms(slowest['ms_per_tick'])} ms per batch. Of epoch "
        f"{epoch['epoch'] + 1}, with the stages' filling and draining.</p>"
        + charts.bars(stages)
        + charts.keys((text, colour) for _, text, colour in charts.SHARES),
    )
    yield "Staleness", _staleness(stages)


def _ms(milliseconds: float) -> str:
    form = ",.0f" if milliseconds >= 100 else ".3g"
    return f"{milliseconds:{form}}"


def _staleness(stages: list[dict[str, Any]]) -> str:
    columns = {
        "stage": ("stage", "{}"),
        "updates late": ("staleness", "{}"),
        "weight drift": ("drift", "{:.2%}"),
        "gradient norm": ("gradient_norm", "{:.3g}"),
        "transformed": ("transformed_norm", "{:.3g}"),
        "learning rate": ("learning_rate", "{:.4g}"),
        "activations link": ("activations_link", "{:.0%}"),
        "gradients link": ("gradients_link", "{:.0%}"),
        "ms per batch": ("ms_per_tick", "{:,.4g}"),
        "peak MiB": ("memory_mib", "{:,.0f}"),
    }
    columns = {
        title: (key, form)
        for title, (key, form) in columns.items()
        if any(one[key] is not None for one in stages)
    }
    rows = [
        [
            None if one[key] is None else form.format(one[key])
            for key, form in columns.values()
        ]
        for one in stages
    ]
    return (
        charts.table(list(columns), rows)
        + "<p class=grey>Updates late: those between the forward of a batch "
        "and its own. Weight drift: how far they move the weights, as a part "
        "of their norm. Gradient norm: of what arrives over the link, and "
        "after the transformer. Link: how full it is as a tick begins.</p>"
    )


def _history(history: dict[str, dict[int, float]]) -> str:
    figures = []
    for name in dict.fromkeys(name.removeprefix("val_") for name in history):
        both = {"training": name, "validation": f"val_{name}"}
        lines = {k: history[v] for k, v in both.items() if v in history}
        figures.append(charts.curves(name.replace("_", " "), lines))
    return f"<div class=two>{''.join(figures)}</div>" if figures else ""


def _pairs(*groups: dict[str, Any]) -> str:
    tables = (
        charts.table(
            ("", ""),
            [
                (name.replace("_", " "), _in_short(value))
                for name, value in group.items()
                if value is not None
            ],
            left=(0, 1),
        )
        for group in groups
    )
    return f"<div class=two>{''.join(tables)}</div>"


def _in_short(value: Any) -> Any:
    """Returns what Keras serializes, a schedule say, as a call would be."""
    if not isinstance(value, dict) or "class_name" not in value:
        return value
    arguments = ", ".join(
        f"{name}={argument}"
        for name, argument in value.get("config", {}).items()
        if argument is not None
    )
    return f"{value['class_name']}({arguments})"


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError(
            "Expected one folder: python -m trainers.report DIR. Received: "
            f"{argv[1:]}"
        )
    root = pathlib.Path(argv[1])
    try:
        found = find(root)
    except ValueError as error:
        # Says what is wrong with the folder; a traceback would add nothing.
        sys.exit(f"{type(error).__name__}: {error}")
    for path in found:
        page = path.with_name("report.html")
        write(page, make_page(path, root).encode())
        print(page)


if __name__ == "__main__":
    app.run(main)
