"""How right the simulation is: its milliseconds per step beside real ones.

    .venv/bin/python scripts/bench_simulation.py --json simulation.json
    .venv/bin/python scripts/bench_simulation.py --quick

Takes ten minutes; `--quick` two. Prints, for each network, batch size, number
of stages K and delay (medians of rounds in which all take turns):

    alone      milliseconds that a tick of each stage takes, one stage at a
               time: its compiled loop is fed constants instead of links, all
               threads of the process are pinned to one core, and it measures
               itself (about 1 % of it) to tell forward from backward
    predicted  milliseconds per step of `fdg_keras.simulation`, which is given
               these, the schedule, and how many cores there are. Links in one
               memory cost nothing beyond what the loops do themselves
    measured   those of the linked stages on all cores, between fill and drain
    ratio      predicted / measured (median of the ratios within a round), and
               the lowest and the highest of them

Nothing of the linked run goes into the prediction. Locked stages (`delay=0`)
are left out: while one of them has the machine for itself, operations that do
not need each other run on several cores, of which the simulation knows nothing.

Devices and threads as in `bench_speed.py`.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import bench_speed
import tensorflow as tf
from bench_monitor import Watched

from fdg_keras.resources import Cost
from fdg_keras.schedules import Delayed
from fdg_keras.simulation import simulate

# Name, hidden layers (of the MLP), batch size, numbers of stages.
CASES = [
    ("resnet20", 0, 32, (2, 4, 8)),
    ("resnet20", 0, 128, (2, 4, 8)),
    ("mlp", 8, 32, (2, 4, 8)),
]
QUICK = [("resnet20", 0, 32, (2, 4, 8))]
DELAYS = (1, 2)


class Alone(bench_speed.Unlinked):
    """The stages one after the other, fed constants, on one core."""

    def run(self, steps: int) -> list[Cost]:
        """Returns what a tick of each stage takes."""
        cores = os.sched_getaffinity(0)
        bench_speed._pin({min(cores)})
        try:
            with self._linked.pipeline():
                return [_tick(loop, steps) for loop in self.loops]
        finally:
            bench_speed._pin(cores)


def _tick(loop, steps):
    loop.reset()
    loop(loop.late, 2, 0, 0.01)
    start = time.perf_counter()
    loop(0, steps, 0, 0.01)
    seconds = (time.perf_counter() - start) / steps
    loop(0, 0, loop.late, 0.01)
    lasted = {"F": [], "B": []}
    for kind, _, _, starts, ends in loop.probe.times(*loop.progress):
        lasted[kind].append(ends - starts)
    forward, backward = (statistics.median(lasted[kind]) for kind in "FB")
    # Between passes the loop has work to do, too.
    share = forward / (forward + backward)
    return Cost(share * seconds, (1 - share) * seconds)


def measure(name, hidden, batch, splits, rounds):
    """Measures stages of one number; returns entries of the JSON file."""
    watched = Watched(
        bench_speed.build(name, hidden, batch), splits, max(DELAYS)
    )
    alone = Alone(watched, batch)
    linked = {
        delay: bench_speed.Linked(
            bench_speed.build(name, hidden, batch), splits, delay
        )
        for delay in DELAYS
    }
    alone.run(8)  # the first run initializes kernels
    cores = len(os.sched_getaffinity(0))
    steps = {}
    for delay, variant in linked.items():
        variant.run(8)
        wanted = bench_speed.ROUND_S / variant.run(8)
        steps[delay] = int(min(max(wanted, bench_speed.LEAST_STEPS), 20000))
    ticks: list[list[float]] = []
    found: dict[int, list[tuple[float, float]]] = {d: [] for d in DELAYS}
    for _ in range(rounds):
        costs = alone.run(max(steps.values()) // 2)
        ticks.append([1e3 * (c.forward_s + c.backward_s) for c in costs])
        for delay, variant in linked.items():
            predicted = simulate(
                costs, schedule=Delayed(delay), devices=1, cores=cores
            )
            measured = variant.run(steps[delay])
            found[delay].append((predicted.seconds_per_step, measured))
    return [
        {
            "model": name,
            "layers": hidden or None,
            "batch": batch,
            "K": splits,
            "delay": delay,
            "cores": cores,
            "alone_ms": [statistics.median(each) for each in zip(*ticks)],
            "predicted_ms": 1e3 * statistics.median(p for p, _ in pairs),
            "measured_ms": 1e3 * statistics.median(m for _, m in pairs),
            "ratio": statistics.median(p / m for p, m in pairs),
            "ratios": [p / m for p, m in pairs],
        }
        for delay, pairs in found.items()
    ]


def _row(case):
    name = case["model"] + (f" ({case['layers']})" if case["layers"] else "")
    alone = "/".join(f"{each:.3g}" for each in case["alone_ms"])
    return (
        f"{name:<10}{case['batch']:>5}{case['K']:>3}{case['delay']:>6}"
        f"{case['predicted_ms']:>11.3f}{case['measured_ms']:>11.3f}"
        f"{case['ratio']:>7.3f}{min(case['ratios']):>8.3f}"
        f"{max(case['ratios']):>8.3f}  {alone}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", choices=["resnet20", "mlp"])
    parser.add_argument("--rounds", type=int, help="default 5, --quick 3")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 8,
    )
    result = {"machine": bench_speed._machine(), "cases": []}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(
        f"{'network':<10}{'batch':>5}{'K':>3}{'delay':>6}{'predicted':>11}"
        f"{'measured':>11}{'ratio':>7}{'lowest':>8}{'highest':>8}  alone"
    )
    rounds = args.rounds or (3 if args.quick else 5)
    for name, hidden, batch, counts in QUICK if args.quick else CASES:
        if args.model not in (None, name):
            continue
        for splits in counts:
            for case in measure(name, hidden, batch, splits, rounds):
                result["cases"].append(case)
                print(_row(case), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
