"""What the pages under docs/ show is what there is.

The Python blocks of a page are one program, which is run as pasted. A `text`
block that follows one is what it prints.
"""

import collections
import csv
import importlib
import json
import os
import pathlib
import random
import re
import shlex
import statistics
import subprocess
import sys

import pytest

from fdg_keras import delays
from trainers import methods, paper, recipes

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT / "docs").as_posix(): path.read_text()
    for path in ROOT.glob("docs/**/*.md")
    if path.name != "table.md"  # made by a script
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    return [
        text for name, text in FENCED.findall(PAGES[page]) if name == language
    ]


def run(*arguments, cwd=ROOT):
    """Runs Python in a process of its own, without a GPU."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", sorted(page for page in PAGES if blocks(page, "python"))
)
def test_code_runs_as_pasted(page, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks(page, "python")))
    out = run(program, cwd=tmp_path)
    at = 0
    for expected in blocks(page, "text"):
        assert expected in out[at:]
        at = out.index(expected, at) + len(expected)
    if (tmp_path / "runs").exists():
        run("-m", "trainers.report", "runs/digits", cwd=tmp_path)
        assert (tmp_path / "runs/digits/report.html").exists()
    # Of ten classes.
    for accuracy in re.findall(r": ([\d.]+)%$", out, re.MULTILINE):
        assert float(accuracy) > 50


def commands():
    """Returns the commands of all pages that run a training script."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", "").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "-m"]:
                    found.append(words[2:])
    return found


PARSE = """
import importlib, json, sys
from absl import flags

FLAGS = flags.FLAGS
common = set(FLAGS)
for name, commands in json.loads(sys.argv[1]).items():
    script = importlib.import_module(name)
    for command in commands:
        folders = FLAGS(command)[1:]
        assert len(folders) == (name == "trainers.report"), command
        if hasattr(script, "parse_runs"):
            script.parse_runs()
    # Scripts define the same ones.
    for flag in set(FLAGS) - common:
        delattr(FLAGS, flag)
"""


@pytest.mark.slow
def test_commands_have_flags_that_exist():
    scripts: dict = {}
    for command in commands():
        scripts.setdefault(command[0], []).append(command)
    assert len(scripts) > 2
    run("-c", PARSE, json.dumps(scripts))


def test_timeline_is_the_schedule():
    assert delays.format_timeline(3, 2, 5) + "\n" in blocks(
        "how_it_works.md", ""
    )


def finish(splits, delay, order, hop=0.0, spread=0.0, seed=0, batches=400):
    """Returns when the last stage ends, in ticks.

    A forward takes a third of a tick, a backward two; a hand-over `hop` ticks.
    """
    draw = random.Random(seed)
    work = []
    for k in range(splits):
        late = delays.stage_delay(k, splits, delay)
        rows = delays.timeline(splits, delay, batches, order)
        passes = [name for row in rows for name in row[k].split()]
        drained = range(max(batches - late, 0), batches)
        work.append(passes + [f"B{batch}" for batch in drained])
    ends: dict = {}
    free, at = [0.0] * splits, [0] * splits
    while any(i < len(w) for i, w in zip(at, work)):
        for k in range(splits):
            while at[k] < len(work[k]):
                name = work[k][at[k]]
                source = k - 1 if name[0] == "F" else k + 1
                ready = 0.0
                if 0 <= source < splits:
                    if (name, source) not in ends:
                        break
                    ready = ends[name, source] + hop
                takes = 1 / 3 if name[0] == "F" else 2 / 3
                takes *= 1 + spread * (2 * draw.random() - 1)
                free[k] = ends[name, k] = max(free[k], ready) + takes
                at[k] += 1
    return max(free)


def test_why_two_batches_per_hop():
    rows = re.findall(
        r'^\| `delay=(\d)`(?:, `order="(\w+)"`)? '
        r"\| (\d+) \| (\d+) \| (\d+) \|$",
        PAGES["how_it_works.md"],
        re.MULTILINE,
    )
    assert len(rows) == 6
    for delay, order, *figures in rows:
        case = 4, int(delay), order or "forward_first"
        varying = [finish(*case, spread=0.3, seed=seed) for seed in range(5)]
        found = [
            finish(*case),
            finish(*case, hop=0.1),
            statistics.median(varying),
        ]
        assert [round(f) for f in found] == [int(f) for f in figures]


def test_speeds_are_those_that_were_measured():
    """What choosing.md says in words."""
    results = (ROOT / "docs" / "results" / "speed.json").read_text()
    cases = json.loads(results)["cases"]
    for case in cases:
        if case["model"] == "mlp":
            assert 0.08 < case["overhead_ms_per_stage"] < 0.13
        elif case["K"] == 2:
            assert 1.8 < case["one_core_ms"] / case["fdg_ms"] < 2.2
            assert 0.9 < case["fdg_over_unlinked"] < 1.1
    text = PAGES["choosing.md"]
    assert "costs each stage about 0.1 ms" in text
    assert "about twice as fast as one core" in text


@pytest.mark.slow
def test_devices_that_are_simulated(tmp_path):
    plot = tmp_path / "plots" / "simulation.svg"
    out = run("scripts/simulate.py", f"--plot={plot}")
    _, table = out.split("\n", 1)
    assert table.removesuffix(f"{plot}\n") in blocks("choosing.md", "")
    assert plot.read_text().count("<polyline") == 7


def test_bytes_are_those_that_were_measured():
    results = (ROOT / "docs" / "results" / "memory.json").read_text()
    cases = json.loads(results)["cases"]
    peaks = []
    for case in cases:
        predicted, held = case["predicted_bytes"], case["held_bytes"]
        assert predicted == pytest.approx(held, rel=0.01)
        assert case["planned_bytes"] == pytest.approx(held, rel=0.01)
        peaks.append(case["planned_sum_bytes"] / case["sum_bytes"])
        columns = ("held", "at_most", "peak", "sum", "planned_sum")
        cells = [case[f"{key}_bytes"] / 2**20 for key in columns]
        cells += [case["step_ms"], case["expected_ms"]]
        assert 0.92 <= round(case["expected_ms"] / case["step_ms"], 2) <= 1.14
        row = [case["network"], f"`{case['stash']!r}`", *map(round, cells)]
        line = "| " + " | ".join(map(str, row)).replace("'", '"') + " |"
        assert line in PAGES["how_it_works.md"]
    assert len(cases) == 8
    assert 0.96 <= round(min(peaks), 2) <= round(max(peaks), 2) <= 1.1


def test_plans_are_as_right_as_was_measured():
    results = (ROOT / "docs" / "results" / "plan.json").read_text()
    networks = collections.defaultdict(list)
    for case in json.loads(results)["cases"]:
        assert case["best"] == pytest.approx(1, rel=1e-6)
        networks[case["model"], case["batch"]].append(case)
    for key, cases in networks.items():
        ways = cases[0]["end_to_end_ms"]
        row = [*key, *(f"{case['ratio']:.2f}" for case in cases)]
        row += [round(max(case["plan_s"] for case in cases))]
        row += [round(ways[k]) for k in ("plan", "operations", "parameters")]
        row += [f"{ways['gain']:.2f}"]
        line = "| " + " | ".join(map(str, row)) + " |"
        assert line in PAGES["choosing.md"]
    assert len(networks) == 8
    cases = [case for found in networks.values() for case in found]
    off = {
        (case["model"], case["K"]): round(case["ratio"], 2)
        for case in cases
        if abs(case["ratio"] - 1) > 0.15
    }
    assert len(cases) == 32
    assert off == {("efficientnet_b0", 8): 1.18, ("unet", 4): 1.20}
    (rounds,) = (
        case["ratios"]
        for case in cases
        if (case["model"], case["K"]) == ("unet", 4)
    )
    assert sorted(round(ratio, 2) for ratio in rounds) == [1.01, 1.2, 1.21]
    gains = [found[0]["end_to_end_ms"]["gain"] for found in networks.values()]
    assert sum(gain > 1.2 for gain in gains) == 6


def test_simulations_are_as_right_as_was_measured():
    for name, beyond, most, most_of_mlp in (
        ("simulation", 1, 0.115, 0.15),
        ("simulation_busy", 3, 0.17, 0.31),
    ):
        results = (ROOT / "docs" / "results" / f"{name}.json").read_text()
        off = collections.defaultdict(list)
        for case in json.loads(results)["cases"]:
            off[case["model"]].append(abs(case["ratio"] - 1))
        assert len(off["resnet20"]) == 12
        assert sum(error > 0.1 for error in off["resnet20"]) == beyond
        assert max(off["resnet20"]) < most
        assert max(off["mlp"]) < most_of_mlp


def test_deep_networks_are_planned_as_fast_as_was_measured():
    results = (ROOT / "docs" / "results" / "plan_deep.json").read_text()
    cases = json.loads(results)["cases"]
    for case in cases:
        assert case["plan_s"] < case["at_most_s"]
    seconds = [round(case["plan_s"]) for case in cases]
    assert [*seconds, round(cases[-1]["refused_s"])] == [4, 5, 34]


def test_errors_are_those_that_were_measured():
    folder = ROOT / "docs" / "results" / "resnet20_10_epochs"
    with (folder / "table.csv").open() as file:
        measured = [
            (
                int(row["stages"]),
                f"{float(row['test_error']):.1f}",
                row["seeds"],
            )
            for row in csv.DictReader(file)
        ]
    rows = re.findall(
        r"^\| (\d) \| .* \| \**([\d.]+)\** \| (\d) \|$",
        PAGES["choosing.md"],
        re.MULTILINE,
    )
    shown = [(int(splits), error, seeds) for splits, error, seeds in rows]
    assert sorted(shown) == sorted(measured)
    assert len(shown) == 16


def reported(dataset, network, run):
    """Returns what `trainers.paper` knows of a run, as a page has it."""
    recipe = recipes.Recipe(dataset=dataset, model=network)
    (variant,) = methods.parse([run], recipe, emulate=True)
    return paper.figures(variant)


def rows_of(heading):
    """Returns the cells of the first table after a heading of paper.md."""
    _, section = PAGES["paper.md"].split(f"### {heading}")
    lines = re.findall(r"^\| (.*) \|$", section.split("###")[0], re.MULTILINE)
    return [[cell.strip() for cell in line.split(" |")] for line in lines[1:]]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_errors_are_those_of_the_paper(dataset):
    name = dataset.upper().replace("CIFAR", "CIFAR-")
    rows = rows_of(f"Test error on {name}, two modules (%)")
    assert len(rows) > 3
    for label, *cells in rows:
        network = label.lower().replace("-", "", 1).replace("-", "_")
        *found, beta = [float(cell) if cell else None for cell in cells]
        runs = ["bp", "ddg", "dgl", "fr"][: len(found) - 2]
        runs += ["fdg", f"fdg:shrink={beta}"]
        for run, error in zip(runs, found):
            # Two tables of the paper differ in this.
            if (network, run) != ("resnet56", "ddg"):
                expected = reported(dataset, network, run).test_error
                assert error == expected, f"{label}, {run}"


def test_more_figures_are_those_of_the_paper():
    settings = {"beta 1": "", "beta 0.5": ":shrink=0.5"}
    cases = [
        ("Test error of ResNet-56", "resnet56", "test_error"),
        ("Seconds an epoch", "wrn28_10", "seconds"),
    ]
    for heading, network, figure in cases:
        for label, *cells in rows_of(heading):
            method, _, setting = label.lower().partition(", ")
            run = "dp" if method == "data parallel" else method
            for splits, cell in zip((2, 3, 4), cells):
                if setting.startswith("utilisation"):
                    continue
                of = f"{run}:splits={splits}{settings.get(setting, '')}"
                found = getattr(reported("cifar10", network, of), figure)
                assert float(cell) == found, f"{label}, K={splits}"


def test_names_in_the_code_exist():
    """Names such as `loops.Loop._forward`."""
    modules = {path.stem for path in ROOT.glob("fdg_keras/*.py")}
    modules -= {"trainer"}  # A variable, in the pages.
    for page, text in PAGES.items():
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)[`(]", text):
            module, *attributes = name.removeprefix("fdg_keras.").split(".")
            if module not in modules or attributes[-1] in ("json", "py"):
                continue
            found = importlib.import_module(f"fdg_keras.{module}")
            for attribute in attributes:
                assert hasattr(found, attribute), f"{page}: {name}"
                found = getattr(found, attribute)


def test_paths_exist():
    folders = "fdg_keras|trainers|tests|scripts|docs"
    for page, text in PAGES.items():
        for path in re.findall(rf"`((?:{folders})/[\w./]*)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"


def anchors(text):
    """Returns the anchors that GitHub makes of a page's headings."""
    headings = re.findall(
        r"^#+ (.*)$", FENCED.sub("", text), flags=re.MULTILINE
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    text = FENCED.sub("", PAGES[page])
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        here = ROOT / "docs" / page
        file = here.parent / path if path else here
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_index_lists_all_pages():
    for page in PAGES.keys() - {"index.md"}:
        assert f"]({page})" in PAGES["index.md"]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_lines_are_short(page):
    for line in PAGES[page].splitlines():
        assert len(line) <= 80 or line.startswith("|"), line


@pytest.mark.parametrize("page", sorted(PAGES))
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.findall(r"\b(?:TODO|TBD|FIXME)\b|\?\?\?", PAGES[page])
