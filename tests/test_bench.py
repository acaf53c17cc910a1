"""The benchmarks run, and write what they say. Their figures are not tested."""

import importlib
import pathlib

import pytest

from fdg_keras.crossing import STASHES

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEYS = {
    "model",
    "batch",
    "K",
    "one_core_ms",
    "locked_ms",
    "fdg_ms",
    "unlinked_ms",
    "fdg_over_unlinked",
    "overhead_ms_per_stage",
    "stages",
}


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """Makes the scripts importable, and their rounds short."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("bench_speed")
    monkeypatch.setattr(module, "ROUND_S", 0.01)
    return module


@pytest.fixture
def memory(monkeypatch):
    """The benchmark of memory, with a very small transformer."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("bench_memory")
    for name, value in {"LENGTH": 8, "WIDTH": 16, "BLOCKS": 1}.items():
        monkeypatch.setattr(module, name, value)
    # Devices are there already.
    monkeypatch.setattr(module, "configure", lambda splits: None)
    return module


def test_a_case(bench):
    case = bench.measure("mlp", 3, 32, 2, rounds=2)
    assert case.keys() >= KEYS
    assert all(case[key] > 0 for key in KEYS if key.endswith("ms"))
    assert len(case["stages"]) == 2
    for shares in case["stages"]:
        assert sum(shares.values()) == pytest.approx(1.0, abs=0.05)
    assert len(case["rounds_ms"]["fdg"]) == 2
    assert "mlp (3)" in bench._row(case)


def test_a_case_of_emulation(monkeypatch):
    """With a smaller network."""
    script = importlib.import_module("bench_emulation")
    build = script.bench_speed.build
    monkeypatch.setattr(
        script.bench_speed,
        "build",
        lambda name, hidden, batch: build("mlp", 4, batch),
    )
    cases = list(script.measure(8, 3, rounds=2))
    assert [case["K"] for case in cases] == [1, 2, 4]
    for case in cases:
        assert len(case["ratios"]) == 2
        assert case["keras_ms"] > 0
        assert case["emulated_ms"] > 0


def test_a_case_of_the_simulation():
    script = importlib.import_module("bench_simulation")
    cases = script.measure("mlp", 3, 32, 2, rounds=2)
    assert [case["delay"] for case in cases] == [1, 2]
    for case in cases:
        assert len(case["alone_ms"]) == 2
        # Of equal weight: two stages on as many cores, or on one.
        assert case["predicted_ms"] >= 0.5 * max(case["alone_ms"])
        assert case["measured_ms"] > 0
        assert len(case["ratios"]) == 2
        assert "mlp (3)" in script._row(case)


def test_peaks_are_of_stages_that_are_busy(memory, monkeypatch):
    """Here the allocator does not count; it tells how often it was asked."""
    experimental, asked = memory.tf.config.experimental, []

    def count(device):
        asked.append(device)
        return {"current": len(asked), "peak": 1000 * len(asked)}

    resets = []
    monkeypatch.setattr(experimental, "reset_memory_stats", resets.append)
    monkeypatch.setattr(experimental, "get_memory_info", count)
    found = memory.peaks("transformer", 4, 2, 2, "exact", 3)
    assert found["peak_bytes"] == 1000  # asked once, after the second run
    # Each tick of each of two stages in turn, and at the end of each round.
    rounds = (len(asked) - 1) // 5
    assert rounds > 3
    assert set(asked) == set(resets) == {"CPU:0"}
    # The last rounds had the most.
    assert found["sum_bytes"] > 1000 * 2 * (len(asked) - 10)


@pytest.mark.parametrize("stash", STASHES)
def test_bytes_are_as_predicted(memory, stash):
    case = memory.measure("transformer", 4, 3, 2, stash, steps=2, rounds=1)
    assert stash in memory._row(case | {"peak_bytes": 1, "sum_bytes": 1})
    for stage in case["stages"][:-1]:
        # Constants that are the same share memory, small as they are.
        assert stage["predicted_bytes"] == pytest.approx(
            stage["held_bytes"], rel=0.1
        )
        # The seeds that dropout runs again with are not planned for.
        assert stage["planned_bytes"] == pytest.approx(
            stage["held_bytes"], rel=0.1, abs=100
        )
        assert stage["at_most_bytes"] > stage["predicted_bytes"] > 0
        assert stage["planned_peak_bytes"] > stage["planned_sum_bytes"]
        assert stage["planned_sum_bytes"] > stage["planned_bytes"]
    assert case["stages"][-1]["held_bytes"] == 0
    assert case["step_ms"] > 0


def test_planning_deep_networks(monkeypatch):
    script = importlib.import_module("bench_plan")
    monkeypatch.setattr(script, "DEEP", {"resnet20": 60})
    entry = script.plan_deep("resnet20", splits=3, batch=2)
    assert 0 < entry["plan_s"] < 60
    assert 0 < entry["refused_s"] < 60
    assert "resnet20" in script._row_of_deep(entry)


def test_a_case_of_the_cluster():
    """On two devices of this process, which is what workers are compared to."""
    script = importlib.import_module("bench_cluster")
    case = script.measure("mlp", 3, 32, ["CPU:2", "CPU:3"], [], rounds=2)
    assert case["one_process_ms"] > 0
    assert case["workers_ms"] > 0
    assert case["processor_time"] > 0
    assert len(case["rounds_ms"]["workers"]) == 2
    assert "mlp (3)" in script.row(case)


def test_a_deep_network(tmp_path):
    script = importlib.import_module("bench_deep")
    found = script.measure("resnet_digits", "digits", str(tmp_path))
    assert found["batches"] == script.STEPS == len(found["losses"])
    assert 0 < found["step_s"] < found["first_step_s"]
    assert 0.1 < found["peak_gib"] < 100
