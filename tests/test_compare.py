"""Comparing methods: what is run, what the table says, what survives."""

import dataclasses
import json
import re
import signal
import time
import xml.etree.ElementTree

import psutil
import pytest
from test_trainers import run, start

from trainers import figures, methods, paper, processes, tables
from trainers.recipes import Recipe

BASE = Recipe(train_epochs=10, warmup_epochs=1, lr_boundaries=(5, 7, 9))


def parse(*texts, base=BASE, emulate=True):
    return methods.parse(texts, base, emulate)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("bp", {"splits": 1, "delay": 0}),
        ("ddg", {"delay": 1, "emulate": True}),
        ("fr", {"delay": 1, "stash": "replay"}),
        ("fdg", {"emulate": True}),
        ("adl", {"accumulate": 4, "emulate": True}),
        ("dgl", {"training": "local_losses", "delay": 0, "emulate": True}),
        ("dp", {"training": "data_parallel"}),
        ("fdg:splits=4:shrink=0.5", {"splits": 4, "shrink": 0.5}),
        ("fdg:splits=block3+block6", {"splits": ["block3", "block6"]}),
        ("fdg:splits=1", {"splits": 1, "emulate": False}),
        ("fdg:emulate=false", {"emulate": False}),
        ("fdg:stash=current", {"stash": "current", "emulate": False}),
        (
            "fdg:corrections=weight_prediction+lr_rescheduling:warmup_epochs=2",
            {
                "corrections": ("weight_prediction", "lr_rescheduling"),
                "warmup_epochs": 2,
            },
        ),
        (
            "fdg:order=update_first:learning_rate=1e-2:lr_boundaries=5+8",
            {
                "order": "update_first",
                "learning_rate": 0.01,
                "lr_boundaries": (5, 8),
            },
        ),
        ("adl:accumulate=2:limit=64", {"accumulate": 2, "limit": 64}),
    ],
)
def test_what_a_run_is(text, changes):
    (variant,) = parse(text)
    if ":" in text:
        changes = {"emulate": True, **methods.METHODS["fdg"], **changes}
    assert variant.name == text
    assert variant.recipe == dataclasses.replace(BASE, **changes)


def test_what_is_not_emulated():
    variants = parse("bp", "ddg", "fdg", "dgl:emulate=true", emulate=False)
    emulated = [variant.recipe.emulate for variant in variants]
    assert emulated == [False, False, False, True]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"one run or more.*Received: \[\]"),
        (["bp", "bp"], "each once.*Received"),
        (["sgd"], "one of bp, ddg, .*Received: sgd"),
        (["fdg:beta=0.5"], "among dataset, .*Received: 'beta=0.5' in fdg:beta"),
        (["fdg:seed=1"], "Received: 'seed=1'"),
        (["fdg:splits"], "Received: 'splits' in fdg:splits"),
        (["fdg:shrink=half"], "Received: 'shrink=half'"),
        (["fdg:emulate=maybe"], "Received: 'emulate=maybe'"),
        (["fdg:lr_boundaries=soon"], "Received: 'lr_boundaries=soon'"),
        (["bp:splits=2"], "bp .* own splits, 1. Received: 'splits=2' in bp:"),
        (["fr:stash=exact"], "own stash, 'replay'"),
        (["bp", "fdg:shrink=7"], "Received: 7.0 in fdg:shrink=7"),
        (["fdg:corrections=magic"], "Received: 'magic' in fdg:correct"),
    ],
)
def test_bad_runs_are_explained(texts, message):
    with pytest.raises(ValueError, match=message):
        parse(*texts)


def result(errors, seconds, *utilisation):
    return {
        "test_error": errors,
        "seconds": seconds,
        "utilisation": list(utilisation),
    }


def rows():
    base = dataclasses.replace(BASE, model="wrn28_10")
    bp, fdg, corrected, dp = methods.parse(
        [
            "bp",
            "fdg:splits=4",
            "fdg:splits=4:corrections=weight_prediction:emulate=true",
            "dp:splits=4",
        ],
        base,
        emulate=False,
    )
    return [
        tables.summarize(
            bp,
            [
                # The first epoch also compiles.
                result([30.0, 9.0], [99.0, 20.0], [0.97], [0.99]),
                result([31.0, 8.5], [99.0, 22.0], [0.98], [1.0]),
                result([29.0, 8.75], [99.0, 21.0], [0.98], [1.0]),
            ],
        ),
        tables.summarize(
            fdg,
            [result([9.5], [12.34], [0.67, 0.87, 0.74, 0.46])],
        ),
        tables.summarize(corrected, [result([9.0], [20.0])]),
        tables.summarize(dp, []),
    ]


def test_the_table():
    assert (
        tables.markdown(rows()).partition("\n\n")[0]
        == """\
| run | K | seeds | test error, % | s/epoch | utilisation, % \
| paper: test error, % | paper: s/epoch | paper: utilisation, % |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| bp | 1 | 3 | 8.75 [8.50, 9.00] | 21.0 | 98 | 4.01 | 219.1 |  |
| fdg:splits=4 | 4 | 1 | 9.50 | 12.3 | 67/87/74/46 |  | 74.1 | 67/87/74/46 |
| fdg:splits=4:corrections=weight_prediction:emulate=true | 4 | 1 | 9.00 \
| 20.0 *emulated* |  |  |  |  |
| dp:splits=4 | 4 | 0 |  |  |  |  | 84.0 |  |"""
    )


def test_the_table_as_numbers():
    bp, fdg, dp = rows()[0], rows()[1], rows()[3]
    assert (
        tables.comma_separated([bp, fdg, dp])
        == """\
run,stages,seeds,test_error,lowest,highest,seconds,emulated,utilisation,\
paper_test_error,paper_seconds,paper_utilisation
bp,1,3,8.75,8.5,9.0,21.0,False,98.5,4.01,219.1,
fdg:splits=4,4,1,9.5,9.5,9.5,12.34,False,67.0/87.0/74.0/46.0,,74.1,67/87/74/46
dp:splits=4,4,0,,,,,False,,,84.0,
"""
    )


@pytest.mark.parametrize(
    ("text", "model", "found"),
    [
        ("bp", "resnet20", (7.78, None, None)),
        ("fdg:shrink=0.2", "resnet20", (7.23, None, None)),
        ("fdg:shrink=0.3", "resnet20", (None, None, None)),
        ("fdg:splits=4:shrink=0.5", "resnet56", (6.14, 27.3, (38, 29, 17, 10))),
        ("fdg:splits=3:order=update_first", "resnet56", (None, None, None)),
        ("dgl:splits=4", "resnet56", (9.65, None, None)),
        ("bp", "resnet_digits", (None, None, None)),
    ],
)
def test_what_the_paper_reports(text, model, found):
    (variant,) = parse(text, base=dataclasses.replace(BASE, model=model))
    assert paper.figures(variant) == found


def test_times_of_the_paper_are_of_cifar10():
    base = dataclasses.replace(BASE, model="wrn28_10", dataset="cifar100")
    (variant,) = parse("bp", base=base)
    assert paper.figures(variant) == (19.6, None, None)


def test_curves():
    results = [
        result([50.0, 20.0], [4.0, 1.0]),
        result([40.0, 30.0], [5.0, 1.0]),
        result([45.0, 10.0], [9.0, 1.0]),
    ]
    by_epochs = figures.by_epochs(results)
    by_time = figures.by_time(results)
    assert by_epochs == [(1, 45.0), (2, 20.0)]
    assert by_time == [(5.0, 45.0), (6.0, 20.0)]
    text = figures.draw({"a<b": by_time, "c": by_epochs}, "seconds", "error, %")
    svg = xml.etree.ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f"{name}polyline")) == 2
    texts = [element.text for element in svg.iter(f"{name}text")]
    assert {"a<b", "c", "seconds", "error, %"} <= set(texts)
    # One run of one epoch has no length and no height.
    one = figures.draw({"one": [(1, 50.0)]}, "epoch", "error, %")
    assert "nan" not in one
    assert one.count("<circle") == 1
    assert "<circle" not in text


def test_a_folder_of_other_settings_is_refused(tmp_path):
    now = json.loads(json.dumps(dataclasses.asdict(BASE)))
    processes.check_same(tmp_path, BASE)
    config = tmp_path / "config.json"
    config.write_text(json.dumps([{"settings": now}]))
    processes.check_same(tmp_path, BASE)
    config.write_text(json.dumps([{"settings": {**now, "splits": 3}}]))
    with pytest.raises(ValueError, match=r"Received: splits=2 \(was 3\) in /"):
        processes.check_same(tmp_path, BASE)


@pytest.mark.slow
def test_interrupted(tmp_path):
    """The run ends, too, and one line says how to go on."""
    flags = ("--smoke", "--runs=bp", f"--data_dir={tmp_path}")
    with start("compare", *flags, f"--model_dir={tmp_path}/out") as process:
        while "Run 1 of 1" not in (process.stdout.readline() or "Run 1 of 1"):
            pass
        while not (children := psutil.Process(process.pid).children()):
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert f"the same command with --model_dir={tmp_path}/out" in err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.slow
def test_smoke_killed_and_gone_on_with(tmp_path):
    """Killed for real after the first run; then a run fails; then all is well.

    What has ended is not trained again.
    """
    root = tmp_path / "compare"
    flags = ("--smoke", f"--data_dir={tmp_path}", f"--model_dir={root}")
    first = root / "bp" / "seed-0" / "result.json"
    with start("compare", *flags) as process:
        while not first.exists() and process.poll() is None:
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        out, err = process.communicate()
    assert first.exists(), out + err
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    written = first.stat().st_mtime_ns

    status, out, err = run("compare", *flags, "--runs=bp,fdg:splits=999,fdg")
    assert status == 1
    assert "Run 1 of 3, bp/seed-0: has ended before" in out
    assert re.search(r"^ValueError: .*splits=999$", err, re.MULTILINE)
    assert "1 of 3 runs failed: fdg-splits=999/seed-0. See" in err
    assert "Traceback" not in err
    assert "| fdg:splits=999 | 999 | 0 |" in out

    status, out, err = run("compare", *flags)
    assert status == 0, out + err
    assert first.stat().st_mtime_ns == written
    assert re.search(r"^Run 3 of 3, dgl/seed-0$", out, re.MULTILINE)
    for row in (
        r"\| bp \| 1 \| 1 \| \d+\.\d\d \| \d+\.\d \| \d+ \|",
        r"\| fdg \| 2 \| 1 \| \d+\.\d\d \| \d+\.\d \*emulated\* \|  \|",
        r"\| dgl \| 2 \| 1 \|",
    ):
        assert re.search(f"^{row}", out, re.MULTILINE)
    assert (root / "table.md").read_text() in out
    assert (root / "table.csv").read_text().count("\n") == 4
    for name in ("epochs", "time"):
        assert "dgl" in (root / f"test_error_by_{name}.svg").read_text()
    found = processes.read_result(root / "dgl" / "seed-0")
    assert found["settings"]["training"] == "local_losses"
    assert len(found["test_error"]) == len(found["seconds"]) == 2
