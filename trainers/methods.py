"""The methods of the paper's tables, as settings of one recipe.

What is compared is written in one line, `bp,fdg,fdg:splits=4:shrink=0.5`: with
commas between runs, each a method, and what of a `Recipe` it has otherwise.
Within a value, `+` stands for a comma.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from trainers.recipes import Recipe
from trainers.run_flags import parse_splits

#: Back-propagation, DDG, Features Replay, FDG, accumulated decoupled learning
#: (of how many batches is a choice of ours), local losses, data parallelism.
METHODS: dict[str, dict[str, Any]] = {
    "bp": {"splits": 1, "delay": 0},
    "ddg": {"delay": 1},
    "fr": {"delay": 1, "stash": "replay"},
    "fdg": {"delay": 2},
    "adl": {"delay": 2, "accumulate": 4},
    "dgl": {"delay": 0, "training": "local_losses"},
    "dp": {"training": "data_parallel"},
}
# What of a method is not what it is known by.
_FREE = {"accumulate"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table: what is run with each seed.

    Attributes:
        name: As it was asked for, `"fdg:splits=4"`.
        recipe: How it is trained, with any seed.
    """

    name: str
    recipe: Recipe

    @property
    def method(self) -> str:
        """A name in `METHODS`."""
        return self.name.partition(":")[0]

    @property
    def settings(self) -> set[str]:
        """The names of what it has otherwise than its method."""
        return {text.partition("=")[0] for text in self.name.split(":")[1:]}

    @property
    def stages(self) -> int:
        """K, the number of stages or of devices."""
        splits = self.recipe.splits
        return splits if isinstance(splits, int) else len(splits) + 1


def parse(texts: Sequence[str], base: Recipe, emulate: bool) -> list[Variant]:
    """Returns what texts stand for.

    Args:
        texts: Each a method, and maybe settings: `"fdg:splits=4:shrink=0.5"`.
        base: What holds where neither method nor settings say otherwise.
        emulate: Whether to emulate what can be and has stages.

    Raises:
        ValueError: If a text is not such, or is there twice.
    """
    variants = [_parse(text, base, emulate) for text in texts]
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"Expected one run or more, each once. Received: {list(texts)}"
        )
    return variants


def _parse(text: str, base: Recipe, emulate: bool) -> Variant:
    method, *settings = text.split(":")
    if method not in METHODS:
        raise ValueError(
            f"Expected a run to begin with one of {', '.join(METHODS)}, as in "
            f"fdg:splits=4:shrink=0.5. Received: {text}"
        )
    changes = dict(METHODS[method])
    for setting in settings:
        name, _, value = setting.partition("=")
        if name in METHODS[method].keys() - _FREE:
            raise ValueError(
                f"Expected {method} to have its own {name}, "
                f"{METHODS[method][name]!r}. Received: {setting!r} in {text}"
            )
        try:
            changes[name] = _value(name, value)
        except (KeyError, ValueError):
            raise ValueError(
                "Expected the settings of a run to be among "
                f"{', '.join(_settings())}, as in fdg:splits=4:shrink=0.5 or "
                "fdg:corrections=weight_prediction+lr_rescheduling. "
                f"Received: {setting!r} in {text}"
            ) from None
    variant = Variant(text, dataclasses.replace(base, **changes))
    try:
        variant.recipe.check()
    except ValueError as error:
        raise ValueError(f"{error} in {text}") from None
    if "emulate" in changes:
        return variant
    recipe = variant.recipe
    possible = recipe.stash == "exact" and recipe.training != "data_parallel"
    emulate = emulate and possible and variant.stages > 1
    return Variant(text, dataclasses.replace(recipe, emulate=emulate))


def _settings() -> dict[str, Any]:
    """Returns what a run may have otherwise, with its default."""
    default = dataclasses.asdict(Recipe())
    del default["seed"]  # All runs have all seeds.
    return default


def _value(name: str, text: str) -> Any:
    default = _settings()[name]
    if not text:
        raise ValueError
    if name == "splits":
        return parse_splits(text.replace("+", ","))
    if name == "corrections":
        return tuple(text.split("+"))
    if name == "lr_boundaries":
        return tuple(int(epoch) for epoch in text.split("+"))
    if isinstance(default, bool):
        return {"true": True, "false": False}[text]
    # What may be none is a whole number otherwise.
    return int(text) if default is None else type(default)(text)
