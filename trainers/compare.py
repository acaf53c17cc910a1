"""Trains one network by several methods: the paper's tables.

Each method is trained with each seed, one run after the other, each in a
process and a folder of its own. After each, `table.md`, `table.csv` and plots
of the test error in `--model_dir` are made anew, beside what the paper reports.
Interrupted or killed at any moment, the same command goes on where it was: what
has ended is read, what had begun is resumed.

    python -m trainers.compare --smoke
    python -m trainers.compare --model=resnet56 --seeds=0,1,2 \
        --model_dir=runs/resnet56
    python -m trainers.compare --train_epochs=10 --warmup_epochs=1 \
        --lr_boundaries=5,7,9 --model_dir=runs/short --runs=bp,\
fdg:splits=4,fdg:splits=4:corrections=weight_prediction
    python -m trainers.compare --noemulate --model=wrn28_10 --train_epochs=3 \
        --runs=bp,ddg:splits=4,fr:splits=4,dgl:splits=4,dp:splits=4,fdg:splits=4

A run is a method, `bp`, `ddg`, `fr`, `fdg`, `adl`, `dgl` or `dp`, and settings
of its own, any of those in `recipes.Recipe`, with `+` for a comma. The flags of
`trainers/train.py` hold for all runs. Stages are emulated on one device where
that computes the same, so a run costs what back-propagation costs;
`--noemulate` gives each stage its device, and then the table tells how long
that takes and how busy each stage was.

Expected: `--smoke` takes 20 seconds on two cores, and prints a table of three
runs, whose test errors are near 90 %. The third is a part of what is in
`docs/results/resnet20_10_epochs`: half an hour to two hours a run on one core,
19.5, 21.7 and 21.6 %. The others were not run to the end: 300 epochs of
ResNet-56 are about two days a run on two cores, and WRN-28-10 wants GPUs.
"""

import dataclasses
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from fdg_keras.records import write
from trainers import figures, methods, processes, run_flags, tables

FLAGS = flags.FLAGS

run_flags.define_recipe()
for name in ("seed", "delay", "stash"):
    # The methods have their own, and there are several seeds.
    delattr(FLAGS, name)
flags.adopt_module_key_flags(run_flags)  # `--help` shows them, too
FLAGS.set_default("emulate", True)
flags.DEFINE_list(
    "runs",
    ["bp", "ddg", "dgl", "fr", "fdg", "fdg:shrink=0.5"],
    "What to compare: methods, each maybe with settings of its own, as in "
    "bp,fdg:splits=4:shrink=0.5.",
)
flags.DEFINE_list("seeds", ["0"], "Seeds, each of all that is random in a run.")
flags.DEFINE_bool(
    "smoke",
    False,
    "Three runs of two epochs on 256 images of the digits: shows only that it "
    "all runs. --runs and --seeds hold nevertheless.",
)


def parse_runs() -> tuple[list[methods.Variant], list[int]]:
    """Returns what to run, and the seeds.

    Raises:
        ValueError: If a flag says nothing that can be run.
    """
    base = run_flags.parse_recipe()
    texts = FLAGS.runs
    if FLAGS.smoke:
        base = dataclasses.replace(
            base,
            dataset="digits",
            model="resnet_digits",
            train_epochs=2,
            limit=256,
        )
        texts = texts if FLAGS["runs"].present else ["bp", "fdg", "dgl"]
    variants = methods.parse(texts, base, FLAGS.emulate)
    try:
        seeds = [int(seed) for seed in FLAGS.seeds]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            "Expected --seeds to be numbers, each once, as in 0,1,2. Received: "
            f"{','.join(FLAGS.seeds)}"
        )
    return variants, seeds


def folder_of(variant: methods.Variant, seed: int) -> pathlib.Path:
    """Returns where a run is, within --model_dir."""
    return pathlib.Path(variant.name.replace(":", "-"), f"seed-{seed}")


def write_all(
    root: pathlib.Path, variants: Sequence[methods.Variant], seeds: list[int]
) -> str:
    """Writes table and plots of the runs that have ended; returns the table."""
    rows, by_epochs, by_time = [], {}, {}
    for variant in variants:
        folders = [root / folder_of(variant, seed) for seed in seeds]
        results = [r for r in map(processes.read_result, folders) if r]
        rows.append(tables.summarize(variant, results))
        if results:
            name = variant.name + " (emulated)" * variant.recipe.emulate
            by_epochs[name] = figures.by_epochs(results)
            by_time[name] = figures.by_time(results)
    table = tables.markdown(rows)
    write(root / "table.md", table.encode())
    write(root / "table.csv", tables.comma_separated(rows).encode())
    if by_epochs:
        for name, curves, x_name in (
            ("epochs", by_epochs, "epoch"),
            ("time", by_time, "seconds of training"),
        ):
            plot = figures.draw(curves, x_name, "test error, %")
            write(root / f"test_error_by_{name}.svg", plot.encode())
    return table


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")

    # ---- What to run ----------------------------------------------------
    root = pathlib.Path(
        FLAGS.model_dir or time.strftime("runs/compare-%Y%m%d-%H%M%S")
    )
    try:
        variants, seeds = parse_runs()
        runs = {
            root / folder_of(variant, seed): dataclasses.replace(
                variant.recipe, seed=seed
            )
            for seed in seeds
            for variant in variants
        }
        for folder, recipe in runs.items():
            processes.check_same(folder, recipe)
    except ValueError as error:
        # Says what is wrong with a flag; a traceback would add nothing.
        sys.exit(f"{type(error).__name__}: {error}")

    # ---- One run after the other ----------------------------------------
    root.mkdir(parents=True, exist_ok=True)
    for number, (folder, recipe) in enumerate(runs.items(), 1):
        title = f"Run {number} of {len(runs)}, {folder.relative_to(root)}"
        if processes.read_result(folder):
            print(f"{title}: has ended before", flush=True)
            continue
        print(f"\n{title}", flush=True)
        try:
            processes.train(
                recipe,
                folder,
                FLAGS.data_dir,
                FLAGS.download,
                FLAGS.devices,
                FLAGS.virtual_devices,
            )
        except KeyboardInterrupt:
            print(
                "\nInterrupted. To go on from the last end of an epoch: the "
                f"same command with --model_dir={root}",
                file=sys.stderr,
            )
            sys.exit(128 + signal.SIGINT)
        write_all(root, variants, seeds)

    # ---- What came of it ------------------------------------------------
    print(f"\n{write_all(root, variants, seeds)}")
    print(f"This table and plots: {root}")
    failed = [run for run in runs if not processes.read_result(run)]
    if failed:
        names = ", ".join(str(run.relative_to(root)) for run in failed)
        sys.exit(
            f"{len(failed)} of {len(runs)} runs failed: {names}. See above; "
            f"to try them again: the same command with --model_dir={root}"
        )


if __name__ == "__main__":
    app.run(main)
