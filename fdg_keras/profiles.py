"""What was measured of a node, and where that is kept on disk."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# No layer takes longer: eleven days.
_LONGEST_S = 1e6


@dataclass(frozen=True)
class Profile:
    """What a node takes for one batch.

    Attributes:
        forward_s: Seconds of a forward.
        backward_s: Seconds of a backward, 0 if there is nothing to
            differentiate.
        processor_s: Seconds of all cores together, for both.
        keeps_inputs: For each distinct input whether the backward reads it.
        keeps_outputs: Likewise for each output.
        keeps_weights: Likewise for each trainable variable.
        keeps_bytes: What else the backward reads.
        selects_inputs: For each distinct input whether `stash="selective"`
            keeps it for that, were the node a stage.
        selects_outputs: Likewise for each output.
        selects_bytes: What else it keeps.
        views: For each output which distinct input it is in another shape, if
            it is one: both are the same memory.
        running_bytes: What the forward, or the backward, has at once beside
            what the backward reads, weights, and gradients by them.
        unsized: How many tensors the backward reads whose bytes are unknown.
        cheap: Whether `stash="selective"` may run the whole forward again.
        replays: Whether what the backward reads depends on inputs: what a
            layer computes of weights that are frozen does not.
        shapes: Of each output, as far as known before it runs; `None` if not
            even how many axes it has.
    """

    forward_s: float
    backward_s: float
    processor_s: float
    keeps_inputs: tuple[bool, ...]
    keeps_outputs: tuple[bool, ...]
    keeps_weights: tuple[bool, ...]
    keeps_bytes: int
    selects_inputs: tuple[bool, ...]
    selects_outputs: tuple[bool, ...]
    selects_bytes: int
    running_bytes: int
    views: tuple[int | None, ...]
    unsized: int
    cheap: bool
    replays: bool
    shapes: tuple[tuple[int | None, ...] | None, ...]


class ProfileCache:
    """Profiles on disk, a small file each.

    Args:
        folder: Where. Default: `FDG_KERAS_CACHE` in the environment, or else
            `fdg_keras` in the user's folder for caches.

    One that cannot be read, or is not what it should be, is measured again;
    one that cannot be written is not kept. Neither is a reason to fail.

    Raises:
        ValueError: If `folder` is no path.
    """

    def __init__(self, folder: str | os.PathLike | None):
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        default = os.environ.get("FDG_KERAS_CACHE") or f"{home}/fdg_keras"
        try:
            self._folder = pathlib.Path(folder or default).expanduser()
        except TypeError:
            raise ValueError(
                "Expected `cache_dir` to be the path of a folder. Received: "
                f"cache_dir={folder!r}"
            ) from None
        except RuntimeError:
            # A user without a home: nothing is found there, and nothing kept.
            self._folder = pathlib.Path(os.devnull, "fdg_keras")

    def read(
        self, key: str, inputs: int, outputs: int, weights: int
    ) -> Profile | None:
        """Returns what is kept under a name, if it is and can be read.

        Args:
            key: The name.
            inputs: How many distinct ones the node has.
            outputs: How many it has.
            weights: How many trainable ones it has.
        """
        try:
            record = json.loads((self._folder / f"{key}.json").read_text())
            found = Profile(**{k: _tuples(v) for k, v in record.items()})
        # Text of thousands of brackets is a `RecursionError`.
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None
        return found if _is_right(found, inputs, outputs, weights) else None

    def write(self, key: str, found: Profile) -> None:
        """Keeps a profile under a name."""
        path = self._folder / f"{key}.json"
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(dataclasses.asdict(found)))
            beside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()


def _is_right(found: Profile, inputs: int, outputs: int, weights: int) -> bool:
    """Whether all fields are of a node with so many inputs and so on."""
    seconds = (found.forward_s, found.backward_s, found.processor_s)
    indices = (None, *range(inputs))
    return (
        all(map(_is_duration, seconds))
        and all(
            _is_count(count)
            for count in (
                found.keeps_bytes,
                found.selects_bytes,
                found.running_bytes,
                found.unsized,
            )
        )
        and _are(found.keeps_inputs, inputs, (False, True))
        and _are(found.keeps_outputs, outputs, (False, True))
        and _are(found.selects_inputs, inputs, (False, True))
        and _are(found.selects_outputs, outputs, (False, True))
        and _are(found.keeps_weights, weights, (False, True))
        and _are(found.views, outputs, indices)
        and isinstance(found.cheap, bool)
        and isinstance(found.replays, bool)
        and isinstance(found.shapes, tuple)
        and len(found.shapes) == outputs
        and all(map(_is_shape, found.shapes))
    )


def _is_shape(value: Any) -> bool:
    """Whether it is one, or unknown."""
    if value is None:
        return True
    if not isinstance(value, tuple):
        return False
    sizes = [size for size in value if size is not None]
    # No element has more than 16 bytes.
    return all(map(_is_count, sizes)) and _is_count(16 * math.prod(sizes))


def _tuples(value: Any) -> Any:
    """Returns what JSON has as lists as it was."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_duration(value: Any) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and 0 <= value <= _LONGEST_S


def _is_count(value: Any) -> bool:
    # Bytes are counted in 64 bits.
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and 0 <= value < 2**63


def _are(values: Any, count: int, options: Sequence[Any]) -> bool:
    """Whether there are so many values, each of them an option."""
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(
            # 1 is no truth, and the truth no index.
            any(type(v) is type(o) and v == o for o in options)
            for v in values
        )
    )
