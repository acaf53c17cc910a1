"""The training scripts from the outside."""

import os
import pathlib
import re
import subprocess
import sys
import time

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def start(script: str, *flags: str) -> subprocess.Popen[str]:
    """Starts a script as a user does, with its own TensorFlow."""
    return subprocess.Popen(
        [sys.executable, "-m", f"trainers.{script}", *flags],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *flags: str) -> tuple[int, str, str]:
    """Runs a script; returns its status and what it has printed."""
    with start(script, *flags) as process:
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--splits=2",),
        (
            "--splits=block1,block2",
            "--shrink=0.5",
            "--delay=1",
            "--order=update_first",
            "--stash=current",
        ),
    ],
    ids=["two stages", "named cuts"],
)
def test_digits_smoke(tmp_path, flags):
    status, out, err = run(
        "digits", "--smoke", f"--model_dir={tmp_path}", *flags
    )
    assert status == 0, out + err
    # Which layers are where, the progress bars, both accuracies, the logs.
    assert re.search(r"^ *0 +CPU:0 +stem_conv1 ", out, re.MULTILINE)
    assert re.search(r"^ *1 +CPU:1 +block", out, re.MULTILINE)
    assert len(re.findall(r"Epoch 2/2", out)) == 2
    for name in ("fdg_keras.Trainer", "keras.Model"):
        assert re.search(rf"^{name} +\d+\.\d\d%", out, re.MULTILINE)
    assert f"tensorboard --logdir {tmp_path}" in out
    keras.saving.load_model(tmp_path / "model.keras")
    for name in ("fdg_keras", "model_fit"):
        assert list((tmp_path / name).rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_train_smoke_killed_and_resumed(tmp_path):
    """Killed for real, then taken up in three stages."""
    folder = tmp_path / "run"
    flags = (
        "--smoke",
        f"--data_dir={tmp_path}",
        f"--model_dir={folder}",
        "--shrink=0.5",
        "--corrections=weight_prediction",
    )
    with start("train", *flags) as process:
        for _ in range(1200):
            if list(folder.glob("checkpoint-*")) or process.poll() is not None:
                break
            time.sleep(0.1)
        process.kill()
        out, err = process.communicate()
    assert list(folder.glob("checkpoint-*")), out + err

    status, out, err = run("train", *flags, "--resume", "--splits=3")
    assert status == 0, out + err
    assert re.search(r"^ *2 +CPU:2 +\S+ +logits ", out, re.MULTILINE)
    assert re.search(r"^Going on after [12] epochs", out, re.MULTILINE)
    assert re.search(r"^Test error: \d+\.\d\d %", out, re.MULTILINE)
    assert f"tensorboard --logdir {folder}" in out
    keras.saving.load_model(folder / "model.keras")
    assert (folder / "history.csv").read_text().count("\n") == 3

    # It was watched.
    status, out, err = run("report", str(folder))
    assert status == 0, out + err
    page = folder / "logs" / "report.html"
    assert str(page) in out
    assert "weight_prediction" in page.read_text()

    status, out, err = run("train", *flags)
    assert status != 0
    assert "--resume" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        ("digits", "--delay=-1", "delay"),
        ("digits", "--splits=no_such_layer", "no_such_layer"),
        ("digits", "stray", "Received: ['stray']"),
        ("train", "--dataset=mnist", "--download"),
        ("train", "--lr_boundaries=soon", "Received: soon"),
    ],
)
def test_bad_flags_are_explained(tmp_path, script, flag, message):
    flags = ["--smoke", flag]
    if script == "train":
        flags.append(f"--data_dir={tmp_path}")
    if flag != "--resume":
        flags.append(f"--model_dir={tmp_path / 'run'}")
    status, out, err = run(script, *flags)
    assert status != 0
    assert message in out + err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
