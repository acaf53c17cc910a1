"""Results of many runs as a table, beside the paper's figures."""

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Any

from trainers import paper
from trainers.methods import Variant

#: Of a table in Markdown.
COLUMNS = (
    *("run", "K", "seeds", "test error, %", "s/epoch", "utilisation, %"),
    *("paper: test error, %", "paper: s/epoch", "paper: utilisation, %"),
)
NOTE = """\
Test error: after the last epoch, the median over seeds [from, to]. s/epoch:
training without testing, the median over epochs and seeds; *emulated* runs
train one stage after the other on one device, so theirs is not that of stages.
Utilisation: the part of its time that each stage was computing. The paper
trained for 300 epochs, on GPUs."""


def summarize(
    variant: Variant, results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns what a table shows of a variant.

    Args:
        variant: What was run.
        results: Of those of its seeds that have ended, see `processes`.

    Returns:
        By name: `run`; `stages`; `seeds`, how many; `test_error`, `lowest` and
        `highest`, in %; `seconds`; `emulated`; `utilisation`, in %, of each
        stage; and `paper_test_error`, `paper_seconds`, `paper_utilisation`.
        `None` is not known.
    """
    reported = paper.figures(variant)
    errors = [result["test_error"][-1] for result in results]
    seconds = [_typical(result["seconds"]) for result in results]
    used = [parts for result in results for parts in result["utilisation"]]
    return {
        "run": variant.name,
        "stages": variant.stages,
        "seeds": len(results),
        "test_error": statistics.median(errors) if errors else None,
        "lowest": min(errors, default=None),
        "highest": max(errors, default=None),
        "seconds": statistics.median(seconds) if seconds else None,
        "emulated": variant.recipe.emulate,
        "utilisation": [100 * statistics.median(p) for p in zip(*used)] or None,
        "paper_test_error": reported.test_error,
        "paper_seconds": reported.seconds,
        "paper_utilisation": reported.utilisation,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows that `summarize` made as a table with a note below."""
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)]]
    lines += [_cells(row) for row in rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{NOTE}\n"


def comma_separated(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the same as CSV, with all digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {
            name: "/".join(str(part) for part in value)
            for name, value in row.items()
            if isinstance(value, (list, tuple))
        }
        writer.writerow({**row, **flat})
    return text.getvalue()


def _cells(row: dict[str, Any]) -> list[str]:
    error = _number(row["test_error"], 2)
    if row["seeds"] > 1:
        error += f" [{row['lowest']:.2f}, {row['highest']:.2f}]"
    seconds = _number(row["seconds"], 1)
    if seconds and row["emulated"]:
        seconds += " *emulated*"
    return [
        row["run"],
        str(row["stages"]),
        str(row["seeds"]),
        error,
        seconds,
        _parts(row["utilisation"]),
        _number(row["paper_test_error"], 2),
        _number(row["paper_seconds"], 1),
        _parts(row["paper_utilisation"]),
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _parts(values: Sequence[float] | None) -> str:
    return "/".join(f"{value:.0f}" for value in values or ())


def _typical(seconds: Sequence[float]) -> float:
    """Returns the median, without the first epoch, which also compiles."""
    return statistics.median(seconds[1:] or seconds)
