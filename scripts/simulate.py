"""What so many devices would do: speed-up over K, simulated, before they exist.

    python scripts/simulate.py
    python scripts/simulate.py --model=wrn28_10 --splits=1,2,3,4 --jitter=0.1
    python scripts/simulate.py --operations_per_s=1e14 --gbit_per_s=10

Cuts a network into K stages as `fdg_keras.Trainer(splits=K)` does, and
simulates them on K equal devices in a row. Prints, and draws, how many times as
fast as one device they are:

    limit      what the slowest stage would be alone, never waiting
    locked     back-propagation, one stage at a time (`delay=0`)
    GPipe      micro-batches: all forwards, then all backwards, one update
    1F1B       micro-batches: a backward as soon as there can be one
    delay 1    the schedule of DDG and of PipeDream. (The authors of DDG lock
               the forwards, too: then it is slower than this.)
    delay 2    FDG
    delay 3    the same with more slack
    MiB        of the stage that needs most, for delay 2, with momentum

What is assumed: a forward takes the operations that `print(trainer.plan)` is
made of, an estimate that counts memory traffic as operations; a backward takes
twice as many; both run at `--operations_per_s`, whatever they are and however
small the batch. An update takes no time. Every pass takes `--overhead_us` on
top: a tick of this library was seen to take 0.1 ms beyond its computation.
Tensors are float32, and gradients over a cut are as large as the activations.
Memory holds what every layer makes, so it is rather too much.

Expected: about ten seconds.
"""

import math
import os
import pathlib
import sys

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from fdg_keras import planning, slicing
from fdg_keras.records import write
from fdg_keras.resources import STASHES, Cable, Cost
from fdg_keras.schedules import Delayed, Flushed
from fdg_keras.simulation import simulate
from trainers import figures, models

FLAGS = flags.FLAGS

flags.DEFINE_enum("model", "resnet110", sorted(models.NETWORKS), "The network.")
flags.DEFINE_list("splits", "1,2,4,8,16,32,64", "Numbers of stages, K.")
flags.DEFINE_integer("batch_size", 128, "Samples in a batch.", lower_bound=1)
flags.DEFINE_integer(
    "micro_batches", 8, "Parts of a batch of GPipe and 1F1B.", lower_bound=1
)
flags.DEFINE_float(
    "operations_per_s",
    1e13,
    "Speed of a device. The default is about that of a GTX 1080 Ti: as an "
    "element moved counts as 150 operations, it moves 270 GB/s.",
)
flags.DEFINE_float("gbit_per_s", 100.0, "Bandwidth between neighbours.")
flags.DEFINE_float("latency_us", 10.0, "Latency between them.")
flags.DEFINE_float("overhead_us", 50.0, "What a pass takes beyond its work.")
flags.DEFINE_float(
    "jitter",
    0.0,
    "Standard deviation of the time of a pass, as a part of it.",
)
flags.DEFINE_integer("seed", 0, "Seed of the jitter.", lower_bound=0)
flags.DEFINE_enum(
    "stash",
    "exact",
    # What "selective" keeps is known only once a stage is traced.
    [name for name in STASHES if name != "selective"],
    "What is kept for a backward.",
)
flags.DEFINE_string("plot", "runs/simulation.svg", "Where to draw the curves.")
flags.register_validator(
    "splits",
    lambda value: (
        value and all(each.isdecimal() and int(each) > 0 for each in value)
    ),
    "must be whole numbers, 1 or more, with commas",
)
# Beyond these nothing is simulated but overflow.
for name, (least, most) in {
    "operations_per_s": (1.0, 1e24),
    "gbit_per_s": (1e-6, 1e12),
    "latency_us": (0.0, 1e12),
    "overhead_us": (0.0, 1e12),
    "jitter": (0.0, 10.0),
}.items():
    flags.register_validator(
        name,
        lambda value, least=least, most=most: least <= value <= most,
        f"must be from {least:g} to {most:g}",
    )

# In the picture, where the limit would mostly lie below other curves.
_NAMES = {
    "locked": "back-propagation, locked",
    "GPipe": "GPipe",
    "1F1B": "1F1B",
    "delay 1": "delay 1 (the schedule of DDG)",
    "delay 2": "delay 2 (FDG)",
    "delay 3": "delay 3",
}
_BYTES = 4  # of a float32
_BACKWARD = 2.0  # forwards that a backward takes


def make_costs(graph: slicing.Graph, splits: int) -> list[Cost]:
    """Returns what the stages cost, cut where the library would."""
    slices = slicing.cut_graph(graph, planning.choose_cuts(graph, splits))
    devices = [f"device {k}" for k in range(splits)]
    plan = planning.make_plan(graph, slices, devices)
    batch_bytes = _BYTES * FLAGS.batch_size
    costs: list[Cost] = []
    for part, stage in zip(slices, plan.stages):
        seconds = stage.operations * FLAGS.batch_size / FLAGS.operations_per_s
        received = plan.stages[len(costs) - 1].sends if costs else 0
        weights = stage.parameters * _BYTES
        costs.append(
            Cost(
                forward_s=seconds,
                backward_s=_BACKWARD * seconds,
                sends=stage.sends * batch_bytes,
                gradient_sends=received * batch_bytes,
                stash=_elements(graph, part.nodes) * batch_bytes,
                inputs=received * batch_bytes,
                weights=weights,
                slots=weights,
            )
        )
    return costs


def _elements(graph: slicing.Graph, nodes: tuple) -> int:
    """Returns the elements that nodes make of one sample."""
    shapes = [graph.symbols[v].shape[1:] for n in nodes for v in n.outputs]
    return sum(math.prod(d or 1 for d in shape) for shape in shapes)


def simulate_all(costs: list[Cost]) -> tuple[dict[str, float], float]:
    """Returns seconds per step of each method, and bytes of delay 2."""
    cable = Cable(FLAGS.gbit_per_s * 1e9 / 8, FLAGS.latency_us * 1e-6)
    overhead = FLAGS.overhead_us * 1e-6
    again = FLAGS.stash == "replay"  # A backward begins with the forward.
    slowest = max((1 + again) * c.forward_s + c.backward_s for c in costs)
    seconds = {"limit": slowest + 2 * overhead}
    needed = 0.0
    for name, schedule in (
        ("locked", Delayed(0)),
        ("GPipe", Flushed(FLAGS.micro_batches)),
        ("1F1B", Flushed(FLAGS.micro_batches, "1f1b")),
        ("delay 1", Delayed(1)),
        ("delay 2", Delayed(2)),
        ("delay 3", Delayed(3)),
    ):
        result = simulate(
            costs,
            cable,
            schedule,
            stash=FLAGS.stash,
            overhead_s=overhead,
            jitter=FLAGS.jitter,
            seed=FLAGS.seed,
        )
        seconds[name] = result.seconds_per_step
        if schedule == Delayed(2):
            needed = max(stage.peak_bytes for stage in result.stages)
    return seconds, needed


def writable(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of a picture, if there can be one."""
    if path.suffix != ".svg":
        raise app.UsageError(
            "Expected --plot to end in .svg, which is what is drawn. Received: "
            f"--plot={FLAGS.plot}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise app.UsageError(f"--plot={FLAGS.plot}: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise app.UsageError(
            "Expected --plot to be a file that can be written. Received: "
            f"--plot={FLAGS.plot}"
        )
    return path


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    plot = writable(pathlib.Path(FLAGS.plot))
    graph = slicing.trace_graph(models.build(FLAGS.model))
    numbers = sorted({int(each) for each in FLAGS.splits})
    try:
        planning.legal_ends(graph, numbers[-1])
    except ValueError as error:
        raise app.UsageError(f"--splits: {error}") from error
    (whole,) = make_costs(graph, 1)
    alone = whole.forward_s + whole.backward_s + 2e-6 * FLAGS.overhead_us
    print(
        f"{FLAGS.model}, batch {FLAGS.batch_size}, on devices of "
        f"{FLAGS.operations_per_s:g} operations/s, links of "
        f"{FLAGS.gbit_per_s:g} Gbit/s and {FLAGS.latency_us:g} us, "
        f"{FLAGS.micro_batches} micro-batches, jitter {FLAGS.jitter:g}"
    )
    print(f"One device: {1e3 * alone:.1f} ms per step. So many times as fast:")
    curves: dict[str, list[tuple[float, float]]] = {}
    for splits in numbers:
        seconds, needed = simulate_all(make_costs(graph, splits))
        if not curves:
            head = "".join(f"{name:>9}" for name in seconds)
            print(f"{'K':>3}{head}{'MiB':>9}")
        for name, each in seconds.items():
            curves.setdefault(name, []).append((splits, alone / each))
        row = "".join(f"{curve[-1][1]:>9.2f}" for curve in curves.values())
        print(f"{splits:>3}{row}{needed / 2**20:>9,.0f}", flush=True)
    drawn = {name: curves[key] for key, name in _NAMES.items()}
    drawn["K times as fast"] = [(k, float(k)) for k, _ in curves["limit"]]
    picture = figures.draw(drawn, "stages, each on a device", "speed-up")
    write(plot, picture.encode())
    print(plot)


if __name__ == "__main__":
    app.run(main)
