"""What was measured of a node, and where that is kept on disk."""

import contextlib
import dataclasses
import json
import os
import pathlib
from dataclasses import dataclass


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
        views: For each output which distinct input it is in another shape, if
            it is one: both are the same memory.
        unsized: How many tensors the backward reads whose bytes are unknown.
    """

    forward_s: float
    backward_s: float
    processor_s: float
    keeps_inputs: tuple[bool, ...]
    keeps_outputs: tuple[bool, ...]
    keeps_weights: tuple[bool, ...]
    keeps_bytes: int
    views: tuple[int | None, ...]
    unsized: int = 0


class ProfileCache:
    """Profiles on disk, a small file each.

    Args:
        folder: Where. Default: `FDG_KERAS_CACHE` in the environment, or else
            `fdg_keras` in the user's folder for caches.

    One that cannot be read is measured again; one that cannot be written is
    not kept. Neither is a reason to fail.
    """

    def __init__(self, folder: str | os.PathLike | None):
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        default = os.environ.get("FDG_KERAS_CACHE") or f"{home}/fdg_keras"
        self._folder = pathlib.Path(folder or default).expanduser()

    def read(self, key: str) -> Profile | None:
        """Returns what is kept under a name, if it is and can be read."""
        try:
            record = json.loads((self._folder / f"{key}.json").read_text())
            for name, value in record.items():
                if isinstance(value, list):
                    record[name] = tuple(value)
            return Profile(**record)
        except (OSError, ValueError, TypeError, KeyError):
            return None

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
