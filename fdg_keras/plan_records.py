"""What a plan that was written as text has to be like, to be read again."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

from fdg_keras.resources import STASHES

# Nothing takes longer: eleven days.
_LONGEST_S = 1e6

#: Of the format. Another version is not read.
VERSION = 2


def check_plan(record: Any) -> None:
    """Checks the record of a plan; names of fields that are none are left.

    Args:
        record: What `Plan.to_json` wrote, read as JSON.

    Raises:
        ValueError: If it is not such a record; the message is a clause.
    """
    _need(isinstance(record, dict), "a plan is an object")
    version = record.get("version")
    _need(
        _is_count(version) and version == VERSION, f"the version is {VERSION}"
    )
    _check_fields(record, _OF_PLANS, "the plan")
    stages = record["stages"]
    _need(isinstance(stages, list) and stages, "it has a list of stages")
    for k, stage in enumerate(stages):
        where = f"stage {k}"
        _need(isinstance(stage, dict), f"{where} is an object")
        _check_fields(stage, _OF_STAGES, where)
        for name in ("costs", "counts"):
            _need(
                len(stage[name]) in (0, len(stage["layers"])),
                f"{where} has as many `{name}` as `layers`, or none",
            )
        if stage["bytes"] is not None:
            _need(
                isinstance(stage["bytes"], dict)
                and all(map(_is_count, stage["bytes"].values())),
                f"{where} has whole numbers of `bytes`",
            )


def _check_fields(
    record: Mapping[str, Any],
    fields: Mapping[str, tuple[str, Callable[[Any], bool]]],
    where: str,
) -> None:
    for name, (meaning, is_right) in fields.items():
        _need(
            name in record and is_right(record[name]),
            f"`{name}` of {where} is {meaning}",
        )


def _need(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # Larger ones do not go into the 64 bits in which they are counted.
    return bool(real and 0 <= value < 2**63)


def _is_duration(value: Any) -> bool:
    return _is_number(value) and value <= _LONGEST_S


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _maybe(
    meaning: str, is_right: Callable[[Any], bool]
) -> tuple[str, Callable[[Any], bool]]:
    return (
        f"{meaning}, or null",
        lambda value: value is None or is_right(value),
    )


_COUNT = "a whole number, 0 or more"
_SECONDS = _maybe("seconds, 0 or more", _is_duration)

_OF_PLANS = {
    "stages": ("a list", _all(lambda _: True)),
    "batch_size": _maybe(
        "a whole number, 1 or more", lambda value: _is_count(value) and value
    ),
    "delay": _maybe(_COUNT, _is_count),
    "stash": _maybe(f"one of {STASHES}", lambda value: value in STASHES),
    "step_s": _SECONDS,
    "whole_s": _SECONDS,
    "measured_step_s": _SECONDS,
    "measured_on": ("a list of names", _all(_is_text)),
    "notes": ("a list of texts", _all(_is_text)),
    "advice": _maybe("a text", _is_text),
}
_OF_STAGES = {
    "device": ("a name", _is_text),
    "layers": (
        "a list of names, one or more",
        lambda value: bool(value) and _all(_is_text)(value),
    ),
    "parameters": (_COUNT, _is_count),
    "operations": ("a number, 0 or more", _is_number),
    "sends": (_COUNT, _is_count),
    "costs": ("a list of numbers, 0 or more", _all(_is_number)),
    "counts": ("a list of whole numbers, 0 or more", _all(_is_count)),
    "forward_s": _SECONDS,
    "backward_s": _SECONDS,
    "again_s": _SECONDS,
    "sends_s": _SECONDS,
    "returns_s": _SECONDS,
    "measured_s": _SECONDS,
    "sends_bytes": _maybe(_COUNT, _is_count),
    "stash_bytes": _maybe(_COUNT, _is_count),
    "peak_bytes": _maybe(_COUNT, _is_count),
    "bytes": _maybe("an object", lambda value: isinstance(value, dict)),
}
