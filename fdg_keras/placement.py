"""Where stages run: device names, and moving variables there and back."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.threads import uninterrupted, warn


def host_of(device: str) -> str:
    """Returns the CPU of the machine that `device` belongs to."""
    spec = tf.DeviceSpec.from_string(device)
    if spec.device_type == "CPU":
        return device
    return spec.replace(device_type="CPU", device_index=0).to_string()


def is_here(device: str) -> bool:
    """Whether `device`, a full name, belongs to this process."""
    return device.startswith("/job:localhost/")


def resolve_devices(devices: Sequence[str] | None, splits: int) -> list[str]:
    """Returns the device of each stage, as full TensorFlow names.

    Args:
        devices: Names as `tf.device` takes them, for one machine or a cluster
            that is connected. `None` stands for all GPUs, or all logical CPUs
            if there is no GPU.
        splits: Number of stages. Fewer devices than stages are dealt round
            robin, with a warning that says so.

    Returns:
        `splits` names such as `"/job:localhost/replica:0/task:0/device:CPU:0"`.

    Raises:
        ValueError: If a device does not exist, or the list is empty.
    """
    known = _logical_devices()
    if devices is None:
        names = _logical_devices("GPU") or _logical_devices("CPU")
    else:
        listed = isinstance(devices, Iterable) and not isinstance(devices, str)
        if not listed or not devices:
            raise ValueError(
                "Expected `devices` to be a list of device names such as "
                f"['GPU:0', 'GPU:1'], or None for all. Received: {devices!r}"
            )
        names = [_full_name(device, known) for device in devices]
    if len(names) < splits:
        warn(
            f"{splits} stages share {len(names)} device(s): "
            f"{', '.join(_short(n) for n in names)}, dealt round robin. Stages "
            "on one device compete for it. Logical devices can stand in for "
            "real ones: see `tf.config.set_logical_device_configuration`."
        )
    return [names[k % len(names)] for k in range(splits)]


class Relocation:
    """Variables that live on the devices of their stages for a while.

    A Keras variable is moved by giving it another TensorFlow variable to keep
    its value in. It gets its own one back afterwards, so whatever was compiled
    with the model before goes on working. While it is away there are two
    copies, of which the one at home is stale.

    Use it as a context manager; within, variables are away. Contexts nest.

    Args:
        may_be_lost: Whether a device can be lost. Then variables that live on
            the device of their stage are moved, too, so that what is at home
            stays as `save` has left it.
    """

    def __init__(self, may_be_lost: bool = False) -> None:
        self._moves: dict[int, _Move] = {}
        self._depth = 0
        self._may_be_lost = may_be_lost

    def move(self, variable: keras.Variable, device: str) -> None:
        """Gives a variable a place on `device`, unless it lives there."""
        home = _keras.get_storage(variable)
        if id(variable) in self._moves or self._lives_on(home, device):
            return
        with tf.device(device):
            away = tf.Variable(
                home,
                trainable=home.trainable,
                name=home.name.split(":")[0],
                dtype=home.dtype,
            )
        self._add(_Move(variable, home, away))

    def share(self, variable: keras.Variable, other: keras.Variable) -> None:
        """Lets two variables keep one value where the second keeps its own.

        Where that is the first one's home, both keep it there, and no copy is
        needed.
        """
        if id(variable) in self._moves:
            self._moves.pop(id(variable)).come_back()
        home, away = map(_keras.get_storage, (variable, other))
        if self._lives_on(home, away.device):
            with uninterrupted():
                # The model's own last: the storage stands for that one.
                for each in (other, variable):
                    _keras.set_storage(each, home)
        else:
            self._add(_Move(variable, home, away))

    def _lives_on(self, home: tf.Variable, device: str) -> bool:
        return home.device == device and not self._may_be_lost

    def _add(self, move: "_Move") -> None:
        with uninterrupted():
            self._moves[id(move.variable)] = move
            if self._depth:
                move.go()

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Brings variables home for a while, if they are away."""
        depth = self._depth
        self._leave(depth)
        try:
            yield
        finally:
            self._enter(depth)

    def save(self) -> None:
        """Copies the values that are away home: of all variables, or none.

        Raises:
            tf.errors.OpError: If a device is lost.
        """
        values = []
        for move in self._moves.values():
            with tf.device(move.home.device):
                values.append(tf.identity(move.away))
        for move, value in zip(self._moves.values(), values):
            move.home.assign(value)

    def abandon(self) -> None:
        """Brings variables home for good, with what `save` has left there."""
        with uninterrupted():
            for move in self._moves.values():
                move.come_back(with_value=False)
            self._moves.clear()
            self._depth = 0

    @property
    def is_away(self) -> bool:
        """Whether variables are on the devices of their stages now."""
        return self._depth > 0

    def _enter(self, depth: int = 1) -> None:
        with uninterrupted():
            if depth and not self._depth:
                for move in self._moves.values():
                    move.go()
            self._depth += depth

    def _leave(self, depth: int = 1) -> None:
        with uninterrupted():
            comes_home = depth > 0 and self._depth == depth
            if comes_home and self._may_be_lost:
                self.save()
            self._depth -= depth
            if comes_home:
                for move in self._moves.values():
                    move.come_back(with_value=not self._may_be_lost)

    def __enter__(self) -> "Relocation":
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()


@dataclass
class _Move:
    variable: keras.Variable
    home: tf.Variable
    away: tf.Variable
    is_away: bool = False

    def go(self) -> None:
        if not self.is_away:
            self.away.assign(self.home)
            _keras.set_storage(self.variable, self.away)
            self.is_away = True

    def come_back(self, with_value: bool = True) -> None:
        if self.is_away:
            if with_value:
                self.home.assign(self.away)
            _keras.set_storage(self.variable, self.home)
            self.is_away = False


def _logical_devices(kind: str | None = None) -> list[str]:
    """Returns full names: of local devices TensorFlow lists `/device:CPU:0`."""
    specs = [
        tf.DeviceSpec.from_string(device.name)
        for device in tf.config.list_logical_devices(kind)
    ]
    return [
        (
            spec
            if spec.job
            else spec.replace(job="localhost", replica=0, task=0)
        ).to_string()
        for spec in specs
    ]


def _full_name(device: str, known: Sequence[str]) -> str:
    try:
        wanted = tf.DeviceSpec.from_string(device)
    except (ValueError, TypeError, AttributeError):
        wanted = None
    matches = []
    for name in known:
        spec = tf.DeviceSpec.from_string(name)
        if wanted is not None and spec == spec.make_merged_spec(wanted):
            matches.append(name)
    if wanted is None or not wanted.device_type or not matches:
        raise ValueError(
            f"Unknown device. Expected one of {[_short(n) for n in known]}. "
            f"Received: {device!r}. Leave `devices` out to take what there "
            "is; logical devices can be made with "
            "`tf.config.set_logical_device_configuration` before TensorFlow "
            "starts, and those of other machines are there after "
            "`fdg_keras.connect_to_cluster`."
        )
    return matches[0]


def _short(name: str) -> str:
    return name.removeprefix("/job:localhost/replica:0/task:0/device:")
