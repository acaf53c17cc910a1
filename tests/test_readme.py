"""What the README shows is what there is."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from fdg_keras.delays import format_timeline

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_first_example_runs_as_pasted():
    run = subprocess.run(
        [sys.executable, "-c", code_blocks("python")[0]],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    accuracy = float(re.findall(r"\[[\d.]+, ([\d.]+)\]", run.stdout)[-1])
    assert accuracy > 0.9


@pytest.mark.slow
def test_all_examples_run_one_after_another_without_a_warning(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(code_blocks("python"))],
        cwd=tmp_path,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "PYTHONPATH": str(ROOT),
            "FDG_KERAS_CACHE": str(tmp_path / "cache"),
            "PYTHONWARNINGS": "always::UserWarning",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    # But for the one that the README announces.
    warned = [line for line in run.stderr.splitlines() if "UserWarning" in line]
    assert all("Splitting will hardly pay" in line for line in warned)
    assert "nan" not in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "cache",
        "logs",
        "plan.png",
        "trained.keras",
    }


def test_first_example_is_short():
    lines = code_blocks("python")[0].splitlines()
    assert len([line for line in lines if line]) <= 10


def test_timeline_is_the_schedule():
    assert f"```\n{format_timeline(3, 2, 6)}\n```" in README


def test_picture_is_the_schedule():
    path = ROOT / "scripts" / "draw_timeline.py"
    spec = importlib.util.spec_from_file_location("draw_timeline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "timeline.svg").read_text() == module.draw()
    # The table of arXiv 1906.09108, figure 2, begins so.
    assert [work for _, work in module.schedule()[0]][:6] == [
        "F0",
        "F1",
        "F2",
        "F3",
        "F4",
        "B0",
    ]


def test_speeds_are_those_that_were_measured():
    path = ROOT / "docs" / "results" / "speed.json"
    cases = {
        (case["batch"], case["K"]): case
        for case in json.loads(path.read_text())["cases"]
        if case["model"] == "resnet20"
    }
    rows = re.findall(
        r"^\| batch (\d+), K=(\d+) \|(.*)\|$", README, re.MULTILINE
    )
    assert {(int(b), int(k)) for b, k, _ in rows} == set(cases)
    for batch, splits, cells in rows:
        case = cases[int(batch), int(splits)]
        busiest = max(stage["computes"] for stage in case["stages"])
        found = [float(f) for f in re.findall(r"[\d.]+", cells)]
        keys = ("one_core_ms", "locked_ms", "fdg_ms", "unlinked_ms")
        assert found == [
            *(round(case[key]) for key in keys),
            round(case["fdg_over_unlinked"], 2),
            round(100 * busiest, 1),
        ]


def test_nothing_is_left_to_be_filled_in():
    assert not re.findall(r"^[A-Z]{4,}$", README, flags=re.MULTILINE)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        file = ROOT / (path or "README.md")
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", t.lower()) for t in titles]
            assert anchor in [name.replace(" ", "-") for name in names]
