"""One optimizer for each stage, made of the one the model was compiled with.

Each stage updates its own variables, with an optimizer of the same class and
configuration. Slots are shared: while stages train, the slots of the model's
optimizer keep their values in those of the stages' optimizers, so that a
checkpoint of the model holds them at any time.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.placement import Relocation
from fdg_keras.threads import uninterrupted, warn

_NO_SCALE = (
    "`mixed_float16` and `LossScaleOptimizer` are not supported: the "
    "scale would have to travel with each delayed gradient. Use the "
    "`mixed_bfloat16` policy, which needs no scale."
)


def check_optimizer(optimizer: Any) -> None:
    """Refuses optimizers that cannot be split into one for each stage.

    Raises:
        ValueError: If `optimizer` is `None`, needs the gradients of all stages
            at once, or scales the loss dynamically.
    """
    if optimizer is None:
        raise ValueError(
            "Expected a model compiled with an optimizer. Call "
            "`model.compile(optimizer, loss)` first. Received: None"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(f"{_NO_SCALE} Received: {optimizer!r}")
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "`MultiOptimizer` is not supported: its optimizers would have to "
            "be split into those of the stages one by one. Compile the model "
            f"with one optimizer. Received: {optimizer!r}"
        )
    if any(isinstance(v, tf.Variable) for v in vars(optimizer).values()):
        raise ValueError(
            "An optimizer with a plain `tf.Variable` is not supported: those "
            "of the stages would not have its value. Expected state that is "
            "Keras': `self.add_variable(...)` or `keras.Variable`. Received: "
            f"{optimizer!r}"
        )
    if overrides(optimizer, "scale_loss"):
        raise ValueError(
            "An optimizer of its own `scale_loss` is not supported: stages do "
            "not scale the loss. Scale gradients in `update_step`. Received: "
            f"{optimizer!r}"
        )
    if getattr(optimizer, "global_clipnorm", None) is not None:
        raise ValueError(
            "`global_clipnorm` needs the gradients of all stages at once, and "
            "decoupled stages never have them. Use `clipnorm` (for each "
            "variable) or `clipvalue`. Received: "
            f"global_clipnorm={optimizer.global_clipnorm}"
        )


def check_precision(model: keras.Model) -> None:
    """Refuses layers whose gradients need a scale, whether there is one or not.

    Raises:
        ValueError: If a layer computes in float16.
    """
    for layer in _keras.layers_within(model):
        if layer.compute_dtype == "float16":
            raise ValueError(
                f"{_NO_SCALE} Received: layer {layer.name!r}, which computes "
                "in float16"
            )


def is_scale_invariant(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether a gradient times a constant makes (nearly) the same update."""
    o = keras.optimizers
    adaptive = (o.Adam, o.Adamax, o.Nadam, o.RMSprop, o.Adagrad, o.Adadelta)
    others = (o.Adafactor, o.Ftrl, o.Lion, o.Lamb, o.Muon, o.ScheduleFreeAdamW)
    return isinstance(optimizer, (*adaptive, *others))


def looks_at_all_gradients(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether somebody's own code may combine gradients of all variables."""
    names = ("apply", "apply_gradients", "_clip_gradients")
    return any(overrides(optimizer, name) for name in names)


def overrides(thing: Any, name: str) -> bool:
    """Whether the class of a model or optimizer has its own for Keras'."""
    owner = next((k for k in type(thing).__mro__ if name in vars(k)), object)
    return owner is not object and not owner.__module__.startswith("keras.")


class StageOptimizers:
    """The optimizers of all stages.

    Args:
        optimizer: The model's optimizer. It is built if it is not.
        everything: The model's trainable variables, in the model's order.
        stages: The trainable variables of each stage.
        devices: The device of each stage.
        relocation: Of the stages' variables, entered by `build`'s caller.

    Raises:
        ValueError: If the optimizer was built on other variables, or cannot be
            split.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        everything: Sequence[keras.Variable],
        stages: Sequence[Sequence[keras.Variable]],
        devices: Sequence[str],
        relocation: Relocation,
    ):
        check_optimizer(optimizer)
        self._whole = optimizer
        # Keras' optimizers know a variable by its storage, and must know those
        # of the model when the model is trained without stages again.
        with relocation.at_home(), uninterrupted():
            if not optimizer.built:
                optimizer.build(list(everything))
            if optimizer.use_ema and self.steps == 0:
                # As after a step, the first of which replaces them anyway: a
                # stage without a gradient makes none.
                _keras.start_averages(optimizer)
            self._undecayed = {
                id(v) for v in everything if not _keras.decays(optimizer, v)
            }
        built_on = _keras.variables_built_on(optimizer)
        if [id(v) for v in built_on] != [id(v) for v in everything]:
            raise ValueError(
                f"The optimizer was built on {len(built_on)} variables, but "
                f"the model now has {len(everything)} trainable ones, or "
                "others. Call `model.compile` again after changing layers or "
                "`trainable`."
            )
        self._slots = _keras.slots_of(optimizer)
        self._index = {id(v): i for i, v in enumerate(everything)}
        self._shared: set[int] = set()
        self._others: list[list[keras.Variable]] = []
        with relocation:
            self.stages = [
                self._build(list(variables), device, relocation)
                for variables, device in zip(stages, devices)
            ]
        self._check_others()

    def pull(self) -> None:
        """Copies step counter and the like from the model's optimizer."""
        for others in self._others:
            for mine, whole in zip(others, self._remaining()):
                mine.assign(whole)

    def push(self) -> None:
        """Copies them back from the stage that has made the most steps.

        All stages have made the same steps if nothing failed, but for those
        without a gradient, which make none.
        """
        steps = [int(_keras.step_counter_of(stage)) for stage in self.stages]
        ahead = self._others[steps.index(max(steps))]
        for mine, whole in zip(ahead, self._remaining()):
            whole.assign(mine)

    @property
    def steps(self) -> int:
        """How often the model's optimizer was applied, for callbacks."""
        return int(_keras.step_counter_of(self._whole))

    @steps.setter
    def steps(self, count: int) -> None:
        _keras.step_counter_of(self._whole).assign(count)

    def learning_rate(self) -> float:
        """Returns the learning rate to announce, 0 if a schedule gives it."""
        source = _keras.learning_rate_of(self._whole)
        return float(source) if isinstance(source, keras.Variable) else 0.0

    def _build(
        self, variables: list, device: str, relocation: Relocation
    ) -> keras.optimizers.Optimizer:
        with tf.device(device):
            optimizer = made_again(self._whole)
            # Stages do not scale the loss, so there is nothing to undo.
            optimizer.loss_scale_factor = None
            optimizer.build(variables)
        excluded = [v for v in variables if id(v) in self._undecayed]
        if excluded:
            optimizer.exclude_from_weight_decay(var_list=excluded)
        mine = set()
        for (kind, index), slot in _keras.slots_of(optimizer).items():
            whole = self._slots.get((kind, self._index[id(variables[index])]))
            if whole is not None:
                mine.add(id(slot))
                self._shared.add(id(whole))
                relocation.share(whole, slot)
        self._others.append(
            [v for v in _without_rate(optimizer) if id(v) not in mine]
        )
        return optimizer

    def _check_others(self) -> None:
        """Refuses state that is neither a slot nor the same in all stages."""
        wanted = [(v.shape, v.dtype) for v in self._remaining()]
        for others in self._others:
            if [(v.shape, v.dtype) for v in others] != wanted:
                raise ValueError(
                    "The optimizer keeps state for single variables that "
                    "cannot be told apart from state of its own. Expected "
                    "slots in attributes that are lists, an entry for each "
                    "variable, as `add_optimizer_variables` returns them. Use "
                    "another optimizer, or `splits=1`. Received: "
                    f"{self._whole!r}"
                )
        # The count of updates is one of them. Of what Keras' own keep besides,
        # all is made of that count.
        its_own = not type(self._whole).__module__.startswith("keras.")
        if its_own and len(self._others) > 1 and len(wanted) > 1:
            warn(
                f"{type(self._whole).__name__} keeps state that is not for "
                "single variables. Here each stage has an optimizer like it, "
                "with such state of its own: a sum over the gradients of all "
                "stages, say, is another."
            )

    def _remaining(self) -> list[keras.Variable]:
        found = _without_rate(self._whole)
        return [v for v in found if id(v) not in self._shared]


def made_again(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer of the same class and settings, not built."""
    try:
        made = type(optimizer).from_config(_keras.config_of(optimizer))
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            "The optimizer cannot be made again for each stage. Expected a "
            "class whose `get_config` returns what its constructor takes, "
            f"`name` included. Received: {optimizer!r}"
        ) from error
    # What was set after it was made need not be in its configuration.
    for name, value in vars(optimizer).items():
        plain = isinstance(value, (bool, int, float, str, tuple, np.generic))
        if plain and name != "built":
            setattr(made, name, value)
        elif name[0] != "_" and isinstance(value, dict):
            # Not slots, which the new one makes for itself.
            if not any(map(_is_variable, _keras.tree.flatten(value))):
                setattr(made, name, dict(value))
        elif name[0] != "_" and callable(value) and not _is_variable(value):
            setattr(made, name, value)
    return made


def _is_variable(value: Any) -> bool:
    return isinstance(value, (keras.Variable, tf.Variable))


def _without_rate(optimizer: keras.optimizers.Optimizer) -> list:
    rate = _keras.learning_rate_of(optimizer)
    return [v for v in optimizer.variables if v is not rate]
