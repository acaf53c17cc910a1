"""What it costs to have stages on workers instead of in one process.

    .venv/bin/python scripts/bench_cluster.py --json cluster.json  (5 minutes)
    .venv/bin/python scripts/bench_cluster.py --quick              (1 minute)

Starts a worker for each stage on this machine, and trains the same network in
turns, on logical CPUs of this process and on the workers. Prints milliseconds
per step (medians of the rounds), the median of the ratios within a round, and
likewise of the processor time of all processes: where the stages leave no core
idle, a step cannot cost less.

Every operation has one thread, here and in the workers, so that a stage is
worth about one core. Both run with the same cores; what differs is that tensors
go from process to process, by gRPC over loopback, and that workers are asked
for signs of life.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_speed
import tensorflow as tf

import fdg_keras
from fdg_keras import delays, sockets

ROOT = Path(__file__).resolve().parent.parent
# Name, hidden layers (of the MLP), batch size, K.
CASES = [("resnet20", 0, 128, 2), ("resnet20", 0, 32, 2), ("mlp", 8, 32, 2)]
QUICK = [("resnet20", 0, 32, 2)]


class Linked(bench_speed.Linked):
    """The stages as they train, on given devices."""

    def __init__(self, name, hidden, batch, devices):
        self._model, self._data = bench_speed.build(name, hidden, batch)
        self.trainer = fdg_keras.Trainer(self._model, len(devices), devices)
        self._late = delays.stage_delay(0, len(devices), 2)
        self.usage = []


@contextlib.contextmanager
def workers(count):
    """Starts workers on this machine; yields their addresses and processes."""
    addresses = [f"127.0.0.1:{sockets.free_port()}" for _ in range(count)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_NUM_INTRAOP_THREADS": "1",
    }
    processes = []
    with contextlib.ExitStack() as started:
        for task in range(count):
            command = [sys.executable, "-m", "fdg_keras.worker"]
            command += ["--cluster", ",".join(addresses), "--task", str(task)]
            process = started.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            started.callback(process.terminate)
            processes.append(process.pid)
        yield addresses, processes


def processor_s(processes):
    """Returns how long this process and others have used a processor."""
    ticks = 0
    for process in ("self", *processes):
        text = Path(f"/proc/{process}/stat").read_text()
        user, system = text.rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(name, hidden, batch, devices, processes, rounds):
    """Measures one case; returns an entry of the JSON file."""
    splits = len(devices)
    variants = {
        "one_process": Linked(
            name, hidden, batch, [f"CPU:{k}" for k in range(splits)]
        ),
        "workers": Linked(name, hidden, batch, devices),
    }
    steps = bench_speed.LEAST_STEPS
    for variant in variants.values():
        variant.run(8)  # the first run initializes kernels
        steps = max(steps, int(bench_speed.ROUND_S / variant.run(8)))
    times = {key: [] for key in variants}
    used = {key: [] for key in variants}
    for _ in range(rounds):
        for key, variant in variants.items():
            start = processor_s(processes)
            times[key].append(1e3 * variant.run(steps))
            used[key].append(processor_s(processes) - start)
    ratio, processor = (
        statistics.median(
            w / o for w, o in zip(found["workers"], found["one_process"])
        )
        for found in (times, used)
    )
    return {
        "model": name,
        "layers": hidden or None,
        "batch": batch,
        "K": splits,
        **{f"{key}_ms": statistics.median(ms) for key, ms in times.items()},
        "workers_over_one_process": ratio,
        "processor_time": processor,
        "rounds_ms": times,
    }


def row(case):
    """Returns a line of the table."""
    name = case["model"] + (f" ({case['layers']})" if case["layers"] else "")
    return (
        f"{name:<10}{case['batch']:>5}{case['K']:>3}"
        f"{case['one_process_ms']:>13.1f}{case['workers_ms']:>10.1f}"
        f"{case['workers_over_one_process']:>8.3f}"
        f"{case['processor_time']:>11.3f}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="default 9, --quick 3")
    parser.add_argument("--workers", help=argparse.SUPPRESS)
    parser.add_argument("--processes", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.workers is None:
        # They end after who is connected to them, or TensorFlow complains.
        with workers(max(splits for *_, splits in CASES)) as (addresses, ids):
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += ["--workers", ",".join(addresses)]
            command += ["--processes", ",".join(map(str, ids))]
            sys.exit(subprocess.run(command).returncode)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    addresses = args.workers.split(",")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * len(addresses),
    )
    devices = fdg_keras.connect_to_cluster({"worker": addresses}, 60)
    result = {"machine": bench_speed._machine(), "cases": []}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(
        f"{'network':<10}{'batch':>5}{'K':>3}{'one process':>13}"
        f"{'workers':>10}{'ratio':>8}{'processor':>11}"
    )
    rounds = args.rounds or (3 if args.quick else 9)
    for name, hidden, batch, splits in QUICK if args.quick else CASES:
        case = measure(
            name,
            hidden,
            batch,
            devices[:splits],
            args.processes.split(","),
            rounds,
        )
        result["cases"].append(case)
        print(row(case), flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
