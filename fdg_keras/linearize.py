"""From a pure stage to a forward, a backward, and what lies between them.

A pure stage is a function `(weights, state, inputs) -> outputs`. It is traced
once, together with its gradient, into one graph, and that is cut into two
functions. What one hands to the other is the stash; see `crossing`.

Knows nothing of Keras or of threads.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from fdg_keras import recompute
from fdg_keras.crossing import (
    OF_THE_FORWARD,
    Crossing,
    Kept,
    Stash,
    StashBytes,
    kept_by,
)
from fdg_keras.cuts import Cut
from fdg_keras.liveness import most_alive
from fdg_keras.subgraphs import (
    ancestors,
    extract,
    read_beside_arguments,
    tensor_bytes,
)


@dataclass
class Pure:
    """What one call of a pure stage computes, as tensors of a graph.

    Attributes:
        outputs: What goes to the next stage.
        own_losses: Scalars that are added to the loss, with weight 1.
        new_state: As many tensors as there is state; a tensor that is the
            state's own argument means that it does not change.
    """

    outputs: list[tf.Tensor]
    own_losses: list[tf.Tensor]
    new_state: list[tf.Tensor]


class Linearized:
    """A pure stage, traced.

    The forward can be called once `cut` has been; what the outputs look like
    is known at once, so that the next stage can be traced before it is known
    which of its inputs have a gradient.

    Args:
        pure: `(weights, state, inputs) -> Pure`, made of TensorFlow
            operations, reading no variable.
        weights: Specs of the tensors to differentiate by.
        state: Specs of the other tensors that stand for variables.
        inputs: Specs of the inputs, `[B, ...]`.
        device: Where its operations run.
        jit_compile: Whether XLA compiles the forward and the backward.
    """

    def __init__(
        self,
        pure: Callable[[list, list, list], Pure],
        weights: Sequence[tf.TensorSpec],
        state: Sequence[tf.TensorSpec],
        inputs: Sequence[tf.TensorSpec],
        device: str,
        jit_compile: bool = False,
    ):
        self._device = device
        #: Whether XLA does compile them, known once it was cut.
        self.jit_compile = jit_compile
        self._crossing: Crossing | None = None

        def trace(weights: list, state: list, inputs: list) -> list:
            tape = tf.GradientTape()
            with tf.device(device), tf.name_scope("forward"), tape:
                tape.watch([*weights, *filter(is_float, inputs)])
                result = pure(weights, state, inputs)
                # An output that is an argument must be a tensor of its own to
                # be fetched, and to be told from the argument.
                with tf.control_dependencies(_effects(result)):
                    result.outputs = [tf.identity(t) for t in result.outputs]
            self._tape = tape
            self._arguments = (weights, state, inputs)
            self._result = result
            return result.outputs

        self._wrapped = tf.compat.v1.wrap_function(
            trace, [list(weights), list(state), list(inputs)]
        )
        self._forward_operations = {
            op.name for op in self._wrapped.graph.get_operations()
        }
        self._check_assignments()
        #: Variables that it reads in spite of all.
        self.read = list(self._wrapped.graph.variables)
        self.output_specs = [
            tf.TensorSpec(t.shape, t.dtype) for t in self._result.outputs
        ]
        _, given_state, _ = self._arguments
        self._changed_state = [
            i
            for i, (new, old) in enumerate(
                zip(self._result.new_state, given_state)
            )
            if new is not old
        ]

    def _check_assignments(self) -> None:
        """Refuses assignments, which nobody who is waited for waits for."""
        graph = self._wrapped.graph
        names = {
            inner.name: variable.name
            for variable in graph.variables
            for outer, inner in graph.captures
            if outer is variable.handle
        }
        for op in graph.get_operations():
            if op.type.startswith(("Assign", "ResourceScatter")):
                name = names.get(op.inputs[0].name, op.inputs[0].name)
                raise ValueError(
                    f"A layer assigns to the `tf.Variable` {name!r} in `call`, "
                    "and a stage would lose what it assigns. Expected state "
                    "that is Keras': make it by `self.add_weight(trainable="
                    "False, ...)`, and assign to it as before."
                )

    @property
    def read_beside_arguments(self) -> list[bool]:
        """For each weight whether a `tf.custom_gradient` loses it."""
        operations = self._wrapped.graph.get_operations()
        return read_beside_arguments(operations, self._arguments[0])

    @property
    def has_own_loss(self) -> bool:
        """Whether the stage adds to the loss."""
        return bool(self._result.own_losses)

    def forward_only(self) -> "Cut":
        """Returns the forward alone."""
        return Cut(self._prune_forward([]), self._changed_state)

    def cut(
        self,
        has_gradient: Sequence[bool],
        wanted: Sequence[bool],
        stash: Stash,
    ) -> "Cut":
        """Adds the gradient and cuts the graph into forward and backward.

        Call it once.

        Args:
            has_gradient: For each output, whether the backward is given the
                gradient of the loss with respect to it. An output without one
                does not depend on the loss.
            wanted: For each input, whether its gradient is asked for.
            stash: Where to cut.
        """
        weights, state, inputs = self._arguments
        given, by_weights, by_inputs = self._differentiate(has_gradient, wanted)
        fetches = [
            [g for g in by_weights if g is not None],
            [g for g in by_inputs if g is not None],
        ]
        if not any(fetches):
            return self.forward_only()
        crossing = self._crossing = Crossing(
            self._wrapped.graph,
            self._forward_operations,
            weights,
            state,
            inputs,
            fetches,
            self._constant(by_weights),
            given,
        )
        kept = crossing.kept(stash)
        if any(t.dtype == tf.variant for t in kept):
            # XLA cannot hand out what a loop keeps for its gradient.
            self.jit_compile = False
        arguments = [*weights, *state, *inputs]
        position = {t.name: i for i, t in enumerate(arguments)}
        stash_arguments = [position.get(t.name) for t in kept]
        made = [t for t in kept if t.name not in position]
        fed_anew = [] if stash in OF_THE_FORWARD else list(weights)
        return Cut(
            forward=self._prune_forward(made),
            changed_state=self._changed_state,
            backward=self._function(
                [*given, *kept, *fed_anew],
                fetches,
                name="backward",
                past=crossing.forward,
            ),
            stash_specs=[tf.TensorSpec(t.shape, t.dtype) for t in kept],
            stash_arguments=stash_arguments,
            needs_weights=bool(fed_anew),
            calls_back=any(
                op.type == "EagerPyFunc"
                and op.name not in self._forward_operations
                for op in self._wrapped.graph.get_operations()
            ),
            weight_has_gradient=[g is not None for g in by_weights],
            input_has_gradient=[g is not None for g in by_inputs],
        )

    def stash_bytes(self, stash: Stash, batch_size: int) -> StashBytes:
        """Returns how many bytes the stash of any mode takes, after `cut`."""
        if self._crossing is None:
            return StashBytes(0, 0)
        return self._crossing.stash_bytes(stash, batch_size)

    def running_bytes(self, batch_size: int) -> int:
        """Returns what the forward, or the backward, has at once, after `cut`.

        Beside what `stash="exact"` keeps, weights, and gradients by them.
        """
        weights, state, inputs = self._arguments
        result = self._result
        fetches = [*result.outputs, *result.own_losses, *result.new_state]
        if self._crossing is not None:
            return self._crossing.running_bytes(fetches, batch_size)
        arguments = [*weights, *state, *inputs]
        sizes = tensor_bytes(
            self._wrapped.graph, arguments, [t.op for t in fetches], batch_size
        )
        before = {t.name for t in (*weights, *state)}
        return most_alive(
            fetches, inputs, before, sizes, (), in_place=recompute.CHEAP
        )

    def kept(self, stash: Stash, batch_size: int) -> Kept:
        """Returns what is kept, after `cut`, and where it is."""
        weights, _, inputs = self._arguments
        outputs = self._result.outputs
        return kept_by(
            self._crossing, stash, weights, inputs, outputs, batch_size
        )

    def _constant(self, by_weights: list) -> set[str]:
        """Returns the names of arguments that training does not change."""
        weights, state, _ = self._arguments
        changed = [state[i].name for i in self._changed_state]
        return {t.name for t in state} - {*changed} | {
            t.name for t, g in zip(weights, by_weights) if g is None
        }

    def _prune_forward(self, made: list[tf.Tensor]) -> Callable[..., Any]:
        weights, state, inputs = self._arguments
        result = self._result
        with self._wrapped.graph.as_default(), tf.device(self._device):
            own_loss = (
                [tf.add_n(result.own_losses)] if self.has_own_loss else []
            )
        changed = [result.new_state[i] for i in self._changed_state]
        return self._function(
            [*weights, *state, *inputs],
            [result.outputs, own_loss, changed, made],
            name="forward",
        )

    def _function(
        self,
        feeds: list,
        fetches: Any,
        name: str,
        past: Collection[str] = (),
    ) -> Callable[..., Any]:
        function = extract(self._wrapped.graph, feeds, fetches, name, past)
        if not self.jit_compile:
            return function
        return tf.function(
            lambda *tensors: function(*tensors),
            jit_compile=True,
            autograph=False,
        )

    def _differentiate(
        self, has_gradient: Sequence[bool], wanted: Sequence[bool]
    ) -> tuple[list, list, list]:
        """Adds the gradient; returns what it is given, and its results."""
        weights, _, inputs = self._arguments
        sources = [
            *weights,
            *(t for t, ask in zip(inputs, wanted) if ask and is_float(t)),
        ]
        outputs = [
            t for t, given in zip(self._result.outputs, has_gradient) if given
        ]
        own_losses = self._result.own_losses
        with self._wrapped.graph.as_default(), tf.device(self._device):
            given = [
                tf.compat.v1.placeholder(t.dtype, t.shape) for t in outputs
            ]
            ones = [tf.ones_like(t) for t in own_losses]
            with tf.name_scope("backward"):
                gradients = self._tape.gradient(
                    outputs + own_losses, sources, output_gradients=given + ones
                )
            # Never one of the placeholders themselves: see `__init__`.
            gradients = [g if g is None else _identity(g) for g in gradients]
        del self._tape
        rest = iter(gradients[len(weights) :])
        by_inputs = [
            next(rest) if ask and is_float(t) else None
            for t, ask in zip(inputs, wanted)
        ]
        return given, gradients[: len(weights)], by_inputs


def is_float(tensor: Any) -> bool:
    """Whether a tensor can have a gradient."""
    return tensor.dtype.is_floating or tensor.dtype.is_complex


def _effects(result: Pure) -> list:
    """Returns what to wait for, so that all is done that layers do.

    Of assertions, prints, summaries and the like nothing is computed, so what
    is cut out of the graph would be without them.
    """
    made = [*result.outputs, *result.own_losses, *result.new_state]
    if not made:
        return []
    _, read = ancestors(made, (), ())
    found: list = []
    for op in made[0].graph.get_operations():
        reads = op.type in ("VarHandleOp", "ReadVariableOp", "Placeholder")
        if op.op_def.is_stateful and not reads and op.name not in read:
            # One that calls a function must be waited for by its results.
            found += [tf.identity(t) for t in op.outputs] or [op]
    return found


def _identity(gradient: Any) -> Any:
    return tf.nest.map_structure(tf.identity, gradient, expand_composites=True)
