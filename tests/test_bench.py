"""The benchmark runs, and writes what it says. Its figures are not tested."""

import importlib.util
import pathlib

import pytest

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


@pytest.fixture
def bench(monkeypatch):
    path = ROOT / "scripts" / "bench_speed.py"
    spec = importlib.util.spec_from_file_location("bench_speed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROUND_S", 0.01)
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
