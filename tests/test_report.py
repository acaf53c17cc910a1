"""The page of a run: from numbers that are known, and from one that was run."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from browser import colours, needs_browser, screenshot
from test_timelines import make_passes

from fdg_keras import timelines
from trainers import report
from trainers import report_charts as charts

ROOT = pathlib.Path(__file__).resolve().parent.parent
K = 3


def make_stage(k):
    waits = [0.02, 0.11, 0.2][k]
    return {
        "stage": k,
        "computing": 0.96 - waits,
        "waiting_for_activations": waits,
        "waiting_for_gradients": 0.03,
        "idle": 0.01,
        "ms_per_tick": 132.4,
        "activations_link": None if k == 0 else 0.4,
        "gradients_link": None if k == K - 1 else 0.2,
        "staleness": 2 * (K - 1 - k),
        "drift": 0.0123 * (K - 1 - k),
        "gradient_norm": None if k == K - 1 else 0.0123,
        "transformed_norm": None if k == K - 1 else 0.00615,
        "learning_rate": 0.1,
        "memory_mib": None,
    }


def make_run(emulated=False, **logs):
    """What `PipelineMonitor` writes; a log is a list with a value an epoch."""
    epochs = len(next(iter(logs.values()), [0, 0]))
    return {
        "emulated": emulated,
        "plan": [
            {
                "stage": k,
                "device": f"CPU:{k}",
                "from": f"first_{k}",
                "to": f"<last_{k}>",
                "layers": ["a"] * (k + 7),
                "parameters": 12345 * (k + 1),
                "work": 1 / K,
                "sends": 16384,
            }
            for k in range(K)
        ],
        "settings": {
            "model": "tiny",
            "momentum": 0.75,
            "clipnorm": None,
            "learning_rate": {
                "class_name": "CosineDecay",
                "config": {"alpha": 0.5, "warmup_target": None},
            },
        },
        "versions": {"keras": "3.99"},
        "epochs": [
            {
                "epoch": e,
                "logs": {name: values[e] for name, values in logs.items()},
                "stages": [] if emulated else [make_stage(k) for k in range(K)],
            }
            for e in range(epochs)
        ],
        "passes": [] if emulated else make_passes(K, 50),
    }


def write_run(folder, run):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pipeline.json"
    path.write_text(json.dumps(run))
    return path


LOGS = {
    "loss": [2.0, 1.0, None],
    "accuracy": [0.1, 0.6, 0.8],
    "val_loss": [2.5, 1.5, 1.25],
    "lr": [0.1, 0.1, 0.1],
}


@pytest.fixture
def page(tmp_path):
    path = write_run(tmp_path, make_run(**LOGS))
    return report.make_page(path, tmp_path)


def text_of(page):
    return " ".join(re.sub("<[^>]*>", " ", page).split())


def test_it_says_what_there_is(page):
    text = text_of(page)
    for wanted in (
        "3 stages, 3 epochs",
        "12,345",
        "16,384",
        "33%",
        "&lt;last_0&gt;",  # names are not markup
        "80 ms of epoch 3",
        "F49",
        "Stage 0 sets the pace: it computes 94.0% of its time",
        "2.46%",
        "0.00615",
        "momentum 0.75",
        "learning rate CosineDecay(alpha=0.5)",
        "keras 3.99",
    ):
        assert wanted in text, wanted
    assert "clipnorm" not in text
    # Nobody told of memory.
    assert "peak MiB" not in text


def test_it_needs_nothing_else(page):
    assert not re.search(r"https?:|src=|href=|@import|url\((?!#hatch)", page)


def test_curves_are_where_the_numbers_are(page):
    (loss,) = re.findall(r"aria-label=\"loss\">(.*?)</svg>", page)
    lines = re.findall('<polyline points="(.*?)"', loss)
    # What is not finite is left out.
    assert [len(line.split()) for line in lines] == [2, 3]
    (x, high), (_, low) = (
        map(float, point.split(",")) for point in lines[0].split()
    )
    assert x == 56
    assert high < low
    for name in ("accuracy", "lr"):
        assert f'aria-label="{name}"' in page


def test_a_run_of_one_epoch(tmp_path):
    path = write_run(tmp_path, make_run(loss=[0.0]))
    assert "<polyline" in report.make_page(path, tmp_path)


def test_history_comes_from_a_csv_file_if_there_are_no_logs(tmp_path):
    path = write_run(tmp_path / "logs", make_run())
    (tmp_path / "history.csv").write_text("epoch,loss\n1,3.5\n2,2.5\n")
    found = report.read_history(
        make_run(), report.nearest(path, tmp_path, "history.csv")
    )
    assert found == {"loss": {1: 3.5, 2: 2.5}}
    assert report.read_history(make_run(loss=[1.0]), None) == {"loss": {1: 1.0}}
    assert report.read_history(make_run(), None) == {}


def test_settings_come_from_a_config_too(tmp_path):
    path = write_run(tmp_path / "run" / "logs", make_run())
    parts = [
        {"settings": {"shrink": n, "model": "big"}, "versions": {"python": "3"}}
        for n in (0.25, 0.5)
    ]
    # Those above the folder that was asked for are of other runs.
    for folder, text in ((tmp_path, "no JSON"), (path.parents[1], parts)):
        (folder / "config.json").write_text(json.dumps(text))
    text = text_of(report.make_page(path, tmp_path / "run"))
    for wanted in ("shrink 0.5", "momentum 0.75", "keras 3.99", "python 3"):
        assert wanted in text
    assert text.startswith("big")


def test_an_emulated_run(tmp_path):
    path = write_run(tmp_path, make_run(emulated=True, loss=[1.0, 0.5]))
    text = text_of(report.make_page(path, tmp_path))
    assert "This run was emulated" in text
    assert "sets the pace" not in text


def test_a_page_for_each_run(tmp_path, capsys):
    for name in ("a", "b/c"):
        write_run(tmp_path / name, make_run(loss=[1.0]))
    report.main(["", str(tmp_path)])
    pages = [tmp_path / "a/report.html", tmp_path / "b/c/report.html"]
    assert capsys.readouterr().out.split() == [str(p) for p in pages]
    assert all(p.read_text().startswith("<!doctype html>") for p in pages)


@pytest.mark.parametrize("name", ["", "not_there"])
def test_no_run(tmp_path, name):
    with pytest.raises(ValueError, match=r"PipelineMonitor.*Received: '/"):
        report.find(tmp_path / name)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "trainers.report", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ValueError: Expected a fold")
    assert "Traceback" not in run.stderr


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_seen(tmp_path, page, dark):
    path = tmp_path / "report.html"
    path.write_text(page)
    pixels = screenshot(path.as_uri(), tmp_path / "report.png", dark=dark)
    found = colours(pixels)
    assert found[0] == (rgb("#14171c") if dark else rgb("#ffffff"))
    # Backwards of many batches, bars, and both curves.
    assert {rgb(c) for c in timelines.COLOURS} <= set(found)
    assert {rgb(c) for _, _, c in charts.SHARES} <= set(found)
    # Nothing hangs over the right edge.
    assert len(colours(pixels[:, -20:])) == 1
