"""`PipelineMonitor`: what it writes, and that TensorBoard shows it."""

import gzip
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf
from browser import colours, needs_browser, screenshot
from tensorboard.plugins.custom_scalar import layout_pb2
from test_probes import BATCH, RATE, K, make_data, make_model

import fdg_keras
from fdg_keras import records, timelines
from fdg_keras.callbacks import PipelineMonitor

EPOCHS = 3
QUANTITIES = {
    "computing",
    "waiting_for_activations",
    "waiting_for_gradients",
    "idle",
    "ms_per_tick",
    "activations_link",
    "gradients_link",
    "staleness",
    "drift",
    "gradient_norm",
    "transformed_norm",
    "learning_rate",
}


def fit(monitor, epochs=EPOCHS, model=None, callbacks=(), fit=None, **settings):
    x, y = make_data(40)
    trainer = fdg_keras.Trainer(model or make_model(), K, **settings)
    trainer.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=(x, y),
        verbose=0,
        callbacks=[*callbacks, monitor],
        **(fit or {}),
    )
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run was watched."""
    path = tmp_path_factory.mktemp("watched")
    fit(PipelineMonitor(path), shrink=0.5)
    return path


def read_events(folder):
    """Values by run, tag and step, as they were written."""
    found = {}
    for path in sorted(folder.rglob("events.out*")):
        run = str(path.parent.relative_to(folder))
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                key = (run, value.tag, event.step)
                found.setdefault(key, []).append(tf.make_ndarray(value.tensor))
    return found


def read_json(folder):
    return json.loads((folder / "pipeline.json").read_text())


# -- What it writes ------------------------------------------------------------


def test_scalars(folder):
    events = read_events(folder)
    scalars = {
        key: value.item()
        for key, (value,) in events.items()
        if key[1].startswith("stages/")
    }
    # Stage 0 has no activations to wait for, nor the last one gradients.
    without = {
        0: {"activations_link"},
        K - 1: {"gradients_link", "gradient_norm", "transformed_norm"},
    }
    assert scalars.keys() == {
        (f"stage_{k}", f"stages/{name}/stage_{k}", epoch)
        for k in range(K)
        for name in QUANTITIES - without.get(k, set())
        for epoch in range(EPOCHS)
    }

    def value(name, k, epoch=EPOCHS - 1):
        return scalars[f"stage_{k}", f"stages/{name}/stage_{k}", epoch]

    for k in range(K):
        parts = ("computing", "waiting_for_activations", "idle")
        shares = [value(n, k) for n in (*parts, "waiting_for_gradients")]
        assert min(shares) >= 0
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert value("staleness", k) == 2 * (K - 1 - k)
        assert value("learning_rate", k) == pytest.approx(RATE)
        assert value("ms_per_tick", k) > 0
    for k in range(K - 1):
        assert 0 <= value("gradients_link", k) <= 1
        assert 0 <= value("activations_link", k + 1) <= 1
        assert value("transformed_norm", k) == pytest.approx(
            0.5 * value("gradient_norm", k)
        )


def test_the_layout_has_all_stages_in_one_chart(folder):
    events = read_events(folder)
    ((layout,),) = (
        v for key, v in events.items() if "custom_scalars" in key[1]
    )
    layout = layout_pb2.Layout.FromString(layout.item())
    charts = [c for category in layout.category for c in category.chart]
    assert len(charts) == len(QUANTITIES)
    tags = {tag for _, tag, _ in events if tag.startswith("stages/")}
    shown = set()
    for chart in charts:
        (pattern,) = chart.multiline.tag
        matches = {tag for tag in tags if re.match(pattern, tag)}
        assert len(matches) >= K - 1, chart.title
        assert len({tag.split("/")[1] for tag in matches}) == 1
        shown |= matches
    assert shown == tags


def test_the_plan_is_a_table(folder):
    (text,) = read_events(folder)[".", "plan", 0]
    head, rule, *rows = text.item().decode().splitlines()
    assert head.startswith("| stage | device | from | to |")
    assert re.fullmatch(r"\|(:?-+:?\|)+", rule)
    assert len(rows) == K
    assert all(row.count("|") == head.count("|") for row in rows)
    assert rows[0].startswith("| 0 | `CPU:0` | `layer0` |")


def test_timelines(folder):
    events = read_events(folder)
    for epoch in range(EPOCHS):
        ((width, height, png),) = events[".", "timeline", epoch]
        pixels = tf.io.decode_png(png).numpy()
        assert pixels.shape == (int(height), int(width), 3)
        assert len(colours(pixels)) > 10


def test_the_trace(folder):
    text = gzip.decompress((folder / "timeline.trace.json.gz").read_bytes())
    events = json.loads(text)["traceEvents"]
    passes = [e for e in events if e.get("cat") == "pass"]
    # Of the last 32 batches, F and B in each stage.
    assert len(passes) == 2 * 32 * K
    assert {e["ph"] for e in events} == set("MXsfC")


def test_the_json(folder):
    run = read_json(folder)
    assert run["emulated"] is False
    assert [stage["stage"] for stage in run["plan"]] == list(range(K))
    assert run["plan"][0]["layers"] == ["layer0"]
    assert sum(stage["work"] for stage in run["plan"]) == pytest.approx(1)
    settings = run["settings"]
    assert settings["delay"] == 2
    assert settings["shrink"] == 0.5
    assert settings["stash"] == "exact"
    assert settings["order"] == "forward_first"
    assert settings["corrections"] == []
    assert settings["optimizer"] == "SGD"
    assert settings["learning_rate"] == pytest.approx(RATE)
    assert settings["epochs"] == EPOCHS
    assert settings["steps_per_epoch"] == 40
    assert run["versions"]["keras"] == keras.__version__
    assert [e["epoch"] for e in run["epochs"]] == list(range(EPOCHS))
    for epoch in run["epochs"]:
        assert epoch["logs"].keys() == {"loss", "val_loss"}
        assert len(epoch["stages"]) == K
        for k, stage in enumerate(epoch["stages"]):
            assert stage["stage"] == k
            assert stage["usage"]["ticks"] == 40
            assert stage.keys() >= QUANTITIES
    assert [len(passes) for passes in run["passes"]] == [64] * K
    passes = [[timelines.Pass(*p) for p in one] for one in run["passes"]]
    assert timelines.steady_window(passes) is not None


def test_nothing_else_is_left(folder):
    names = {path.name for path in folder.iterdir()}
    assert {n for n in names if not n.startswith("events.out")} == {
        "pipeline.json",
        "timeline.trace.json.gz",
        *(f"stage_{k}" for k in range(K)),
    }


def test_numbers_that_are_not_finite():
    written = records.to_json(
        {"loss": float("nan"), "all": np.array([1.5, np.inf]), 3: np.float32(2)}
    )
    assert json.loads(written) == {"loss": None, "all": [1.5, None], "3": 2.0}


# -- How it is used ------------------------------------------------------------


def test_it_is_there_when_the_package_is_imported():
    assert fdg_keras.callbacks.PipelineMonitor is PipelineMonitor


@pytest.mark.parametrize("log_dir", [None, "", 3, b"logs", ["logs"]])
def test_where_to_write(log_dir):
    with pytest.raises(ValueError, match=r"path of a folder.*Received: "):
        PipelineMonitor(log_dir)


def test_it_is_not_for_model_fit(tmp_path):
    message = r"`fdg_keras\.fit` or `fdg_keras\.Trainer\.fit`.*Received"
    monitor = PipelineMonitor(tmp_path / "logs")
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model.fit(*make_data(2), verbose=0, callbacks=[monitor])
    assert not (tmp_path / "logs").exists()
    # Nor is it afterwards.
    fit(monitor, epochs=1, model=model)
    with pytest.raises(ValueError, match=message):
        model.fit(*make_data(2), verbose=0, callbacks=[monitor])


def test_without_delay_and_stages(tmp_path):
    """What there is nothing to say about has no chart."""
    x, y = make_data(5)
    monitor = PipelineMonitor(str(tmp_path))
    fdg_keras.fit(make_model(), x, y, splits=1, verbose=0, callbacks=[monitor])
    tags = {tag for _, tag, _ in read_events(tmp_path)}
    shown = {tag.split("/")[1] for tag in tags if tag.startswith("stages/")}
    assert shown == QUANTITIES - {
        "activations_link",
        "gradients_link",
        "gradient_norm",
        "transformed_norm",
    }


@pytest.mark.parametrize("kind", ["emulate", "run_eagerly"])
def test_emulated_stages(tmp_path, kind):
    model = make_model()
    model.run_eagerly = kind == "run_eagerly"
    fit(PipelineMonitor(tmp_path), 2, model, emulate=kind == "emulate")
    events = read_events(tmp_path)
    assert {tag for _, tag, _ in events} == {"plan", "emulated"}
    assert b"one device ran all stages" in events[".", "emulated", 0][0].item()
    run = read_json(tmp_path)
    assert run["emulated"] is True
    assert len(run["plan"]) == K
    assert run["passes"] == []
    assert [e["stages"] for e in run["epochs"]] == [[], []]
    assert run["epochs"][1]["logs"]["loss"] < run["epochs"][0]["logs"]["loss"]


class Fail(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise RuntimeError("no more")


def test_a_failure_leaves_whole_files(tmp_path, monkeypatch):
    made = []
    make = tf.summary.create_file_writer

    def recording(folder):
        made.append(make(folder))
        return made[-1]

    monkeypatch.setattr(tf.summary, "create_file_writer", recording)
    with pytest.raises(RuntimeError, match="no more"):
        fit(PipelineMonitor(tmp_path), callbacks=[Fail()])
    assert len(made) == 1 + K
    for writer in made:
        with pytest.raises(RuntimeError, match="already closed"):
            writer.set_as_default()
    assert ("stage_0", "stages/drift/stage_0", 1) in read_events(tmp_path)
    assert len(read_json(tmp_path)["epochs"]) == 2


def test_a_run_that_goes_on(tmp_path):
    """The file tells of all its epochs; one that begins anew, of its own."""
    model = make_model()
    fit(PipelineMonitor(tmp_path), 2, model)
    first = read_json(tmp_path)["epochs"]
    fit(PipelineMonitor(tmp_path), 4, model, fit={"initial_epoch": 1})
    epochs = read_json(tmp_path)["epochs"]
    assert [e["epoch"] for e in epochs] == [0, 1, 2, 3]
    assert epochs[0] == first[0]
    assert epochs[1] != first[1]
    fit(PipelineMonitor(tmp_path), 1, model)
    assert [e["epoch"] for e in read_json(tmp_path)["epochs"]] == [0]


def test_the_callers_thread_writes(tmp_path, monkeypatch):
    """Writers belong to a thread: nothing would come of one in another."""
    threads = set()

    def spy(name):
        original = getattr(tf.summary, name)

        def function(*args, **kwargs):
            threads.add(threading.current_thread())
            return original(*args, **kwargs)

        monkeypatch.setattr(tf.summary, name, function)

    for name in ("scalar", "text", "image"):
        spy(name)
    fit(PipelineMonitor(tmp_path), 1)
    assert threads == {threading.main_thread()}


# -- In TensorBoard ------------------------------------------------------------


@pytest.fixture(scope="module")
def tensorboard(folder):
    """The address of a TensorBoard that shows the run."""
    log = folder.parent / "tensorboard.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "tensorboard.main"),
                *(
                    "--logdir",
                    str(folder),
                    "--host",
                    "127.0.0.1",
                    "--port",
                    "0",
                ),
            ],
            stdout=out,
            stderr=out,
        )
    try:
        found = None
        stop = time.monotonic() + 60
        while not found and time.monotonic() < stop:
            time.sleep(0.2)
            assert server.poll() is None, log.read_text()
            found = re.search(r"http://127.0.0.1:\d+/", log.read_text())
        assert found, log.read_text()
        address = found.group()
        while len(get_json(address, "scalars/tags")) < K:
            assert time.monotonic() < stop, "TensorBoard reads nothing"
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def get(address, path, **query):
    url = f"{address}data/plugin/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()


def get_json(*args, **query):
    return json.loads(get(*args, **query))


def test_no_panel_is_empty(tensorboard):
    """By the addresses that the pages of TensorBoard get their data from."""
    tags = get_json(tensorboard, "scalars/tags")
    for run, of_run in tags.items():
        for tag in of_run:
            points = get_json(tensorboard, "scalars/scalars", run=run, tag=tag)
            assert len(points) == EPOCHS
    layout = get_json(tensorboard, "custom_scalars/layout")
    for category in layout["category"]:
        for chart in category["chart"]:
            (pattern,) = chart["multiline"]["tag"]
            series = sum(
                len(
                    get_json(
                        tensorboard,
                        "custom_scalars/scalars",
                        run=run,
                        tag=pattern,
                    )["tag_to_events"]
                )
                for run in tags
            )
            assert series >= K - 1, chart["title"]
    assert get_json(tensorboard, "text/tags") == {".": ["plan"]}
    (text,) = get_json(tensorboard, "text/text", run=".", tag="plan")
    assert "<td" in text["text"]
    assert "<code>CPU:2</code>" in text["text"]
    assert get_json(tensorboard, "images/tags")["."].keys() == {"timeline"}
    images = get_json(
        tensorboard, "images/images", run=".", tag="timeline", sample=0
    )
    assert [image["step"] for image in images] == list(range(EPOCHS))
    query = dict(urllib.parse.parse_qsl(images[-1]["query"]))
    png = get(tensorboard, "images/individualImage", **query)
    assert tf.io.decode_png(png).shape[1:] == (1200, 3)


@needs_browser
def test_its_pages_can_be_seen(tensorboard, tmp_path):
    found = {}
    for page, least in (
        ("scalars", 30),
        ("custom_scalars", 50),
        ("images", 60),
        ("text", 10),
    ):
        pixels = screenshot(
            f"{tensorboard}#{page}",
            tmp_path / f"{page}.png",
            size=(1400, 900),
            milliseconds=6000,
        )
        # The panels: beside the settings, below the tabs and their search.
        panels = pixels[120:, 360:]
        found[page] = colours(panels, at_least=10)
        assert len(found[page]) >= least, page
        if page == "custom_scalars":
            for top, left in itertools.product((155, 460), (430, 780)):
                panel = pixels[top : top + 175, left : left + 285]
                lines = colours(panel, at_least=10)
                # A line has the colour of its run; one may hide another.
                bright = [c for c in lines if max(c) - min(c) > 120]
                assert len(bright) >= 2, (top, left)
    lines = [c for c in found["custom_scalars"] if max(c) - min(c) > 120]
    assert len(lines) >= K
    # Of forwards and of backwards.
    batches = [
        tuple(
            round(255 - part * (255 - int(c[i : i + 2], 16))) for i in (1, 3, 5)
        )
        for c in timelines.COLOURS
        for part in (0.3, 1)
    ]
    assert len(set(batches) & set(found["images"])) >= 4
