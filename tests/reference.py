"""Naive, sequential references of the training; used by tests only.

Notation of Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning
Using Delayed Gradients" (arXiv 1906.09108), with stages counted from zero:

    K         number of stages, k = 0 ... K-1
    d_k       delay of stage k in batches, `delay * (K-1-k)`
    beta      shrink, the factor a gradient is multiplied by at each hop
    F(t)      forward of batch t, B(t) its backward and its update
    w_k[t]    weights of stage k in F(t)

Stage k does F(t), then B(t - d_k), for t = 0, 1, 2 ... (`update_first`: the
other way round where d_k > 0), and after the last batch of an epoch the
backwards that are still due. So, with forward_first and plain SGD,

    w_k[t+1] = w_k[t] - lr * beta**(K-1-k) * grad_k(batch t-d_k; w[t-d_k])

Nothing here knows how the library works. Everything runs eagerly, on the
model's own variables, one batch after the other, in one thread. There are
three references, written from different points of view:

`reference`           back-propagates the whole model, of any shape, and lets
                      each stage apply its part of the gradient late. For
                      `stash="exact"`.
`reference_segments`  passes activations and gradients from stage to stage and
                      runs forwards again for their backwards. For chains of
                      layers; `stash="exact"` and `"replay"`.
`reference_by_hand`   for dense layers, in NumPy; `stash="current"`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

ORDERS = ("forward_first", "update_first")


@dataclasses.dataclass
class Result:
    """What a reference saw; the trained weights are in the model itself.

    Attributes:
        losses: `losses[epoch][t]`, the loss of batch t as Keras reports it:
            every stage's own losses included, with weight 1.
        sizes: `sizes[t]`, the number of samples of batch t.
        outputs: `outputs[epoch][t]`, the list of the model's outputs in F(t).
        optimizers: one for each stage; None for a stage without weights.
    """

    losses: list[list[float]]
    sizes: list[int]
    outputs: list[list[list[np.ndarray]]]
    optimizers: list[keras.optimizers.Optimizer | None]

    @property
    def epoch_losses(self) -> list[float]:
        """Loss of each epoch: the mean over its samples, not its batches."""
        return [np.average(e, weights=self.sizes).item() for e in self.losses]


# Batches, layers and losses.


def split_batches(batch_size: int, x: Any, y: Any, sample_weight: Any = None):
    """Cuts the data into batches, in order; the last one may be short."""
    data = (x, y) if sample_weight is None else (x, y, sample_weight)

    def batch(start: int) -> tuple:
        stop = start + batch_size
        return keras.tree.map_structure(lambda a: a[start:stop], data)

    n = len(keras.tree.flatten(x)[0])
    return [batch(start) for start in range(0, n, batch_size)]


def find_layers(model: keras.Model, names: Sequence[str]):
    """Layers of one stage from their names, "outer/inner" if nested.

    Other names are those of operations, as `x + y`: they hold no weights. A
    layer that is used twice counts once.
    """
    layers: list[keras.layers.Layer] = []
    for name in names:
        found: Any = model
        for part in name.split("/"):
            inside = {x.name: x for x in found.layers} if found else {}
            found = inside.get(part)
        if found is not None and found not in layers:
            layers.append(found)
    return layers


def stage_weights(model: keras.Model, stages) -> list[list[keras.Variable]]:
    """Trainable variables of each stage: each of the model's in just one."""
    weights = [
        [v for layer in layers for v in layer.trainable_variables]
        for layers in stages
    ]
    held = sorted(id(v) for stage in weights for v in stage)
    assert held == sorted(id(v) for v in model.trainable_variables), (
        "the stages do not hold each trainable variable exactly once"
    )
    return weights


def weights_of_groups(model, groups):
    """Trainable variables of each stage, from the names of its layers."""
    return stage_weights(model, [find_layers(model, g) for g in groups])


def own_loss(layers) -> tf.Tensor:
    """Regularizers, activity losses and `add_loss` of a stage's layers."""
    holder = keras.layers.Layer()
    holder.layers = list(
        layers
    )  # A variable that two of them have counts once.
    terms = [tf.reduce_sum(term) for term in holder.losses]
    return tf.add_n(terms) if terms else tf.zeros([], keras.config.floatx())


def main_loss(loss: Any, y: Any, outputs: Any, sample_weight: Any = None):
    """The compiled loss alone: the sum over the model's outputs."""
    losses = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    targets = y if isinstance(y, (list, tuple)) else [y]
    predictions = keras.tree.flatten(outputs)
    assert len(losses) == len(targets) == len(predictions)
    return tf.add_n(
        [
            f(target, prediction, sample_weight=sample_weight)
            for f, target, prediction in zip(
                losses, targets, predictions, strict=True
            )
        ]
    )


def make_optimizers(optimizer, weights):
    """One optimizer like `optimizer` for each stage, on its own weights."""
    optimizers: list[keras.optimizers.Optimizer | None] = []
    for stage in weights:
        if stage:
            copy = type(optimizer).from_config(optimizer.get_config())
            copy.build(stage)
            optimizers.append(copy)
        else:
            optimizers.append(None)
    return optimizers


def apply(optimizer, gradients, weights) -> None:
    """One update; Keras itself refuses a step in which nothing has any."""
    if any(gradient is not None for gradient in gradients):
        if scale := optimizer.loss_scale_factor:  # divided by when applied
            gradients = [None if g is None else scale * g for g in gradients]
        optimizer.apply(gradients, weights)


def ahead(optimizer, weights, updates) -> None:
    """Moves weights by so many steps of momentum alone."""
    for i, w in enumerate(weights):
        if isinstance(optimizer, keras.optimizers.SGD):
            step = optimizer.momentums[i].numpy()
        else:
            n = int(optimizer.iterations)
            if n == 0:
                continue
            m = optimizer._momentums[i].numpy() / (1 - optimizer.beta_1**n)
            v = optimizer._velocities[i].numpy() / (1 - optimizer.beta_2**n)
            # Keras adds epsilon before the bias correction.
            epsilon = optimizer.epsilon / np.sqrt(1 - optimizer.beta_2**n)
            rate = float(optimizer.learning_rate)
            step = -rate * m / (np.sqrt(v) + epsilon)
        w.assign_add(updates * step)


def _dense(gradient):
    return tf.convert_to_tensor(gradient)


# Late back-propagation of the whole model.


def train(
    model: keras.Model,
    groups: Sequence[Sequence[str]],
    batches: Sequence[tuple],
    loss: Any,
    optimizer: keras.optimizers.Optimizer,
    *,
    delay: int = 2,
    shrink: float = 1.0,
    order: str = "forward_first",
    epochs: int = 1,
    on_epoch_end: Callable[[], None] = lambda: None,
    optimizers: Sequence[keras.optimizers.Optimizer | None] | None = None,
    predict: bool = False,
    compensate: float = 0.0,
    reschedule: float = 0.0,
    rates: Callable[[int, int], float] | None = None,
) -> Result:
    """Trains `model` in place, as `stash="exact"` must.

    F(b) and B(b) of a stage use the same weights; so batch b's gradient is
    the plain gradient of the whole model at the weights that each stage had
    in F(b). Stage k merely applies it d_k batches late.

    Args:
        model: Model, compiled or not. Its compiled loss is not looked at.
        groups: For each stage the names of its layers.
        batches: Tuples `(x, y)` or `(x, y, sample_weight)`.
        loss: A `keras.losses.Loss`, or a list of them, one for each output.
        optimizer: A pattern: each stage gets a fresh one of its config.
        delay: Batches of delay per hop.
        shrink: beta.
        order: `"forward_first"` or `"update_first"`.
        epochs: Number of passes; each one drains at its end.
        on_epoch_end: Called after each drain.
        optimizers: Those of a former result, to go on with.
        predict: Whether F(b) uses the weights that momentum leads to.
        compensate: lambda of the delay compensation.
        reschedule: T of the learning-rate rescheduling, in updates.
        rates: The learning rate of each epoch's ticks. Those of the drain
            count as the last one. Default: the optimizer's.
    """
    assert order in ORDERS
    stages = [find_layers(model, names) for names in groups]
    K, n = len(stages), len(batches)
    d = [delay * (K - 1 - k) for k in range(K)]
    weights = stage_weights(model, stages)
    optimizers = list(optimizers or make_optimizers(optimizer, weights))
    result = Result([], batch_sizes(batches), [], optimizers)
    # Updates between F(b) and B(b).
    tau = [max(i - (order == "update_first"), 0) for i in d]
    constant = float(optimizer.learning_rate)
    now_at = 0, 0  # this epoch, this tick of it

    def set_rate(k):
        rate = rates(*now_at) if rates else constant
        if rates and optimizers[k] is not None:
            optimizers[k].learning_rate = rate
        if tau[k] and reschedule and optimizers[k] is not None:
            young = 1 - min(int(optimizers[k].iterations) / reschedule, 1)
            optimizers[k].learning_rate = rate * tau[k] ** -young

    for epoch in range(epochs):
        result.losses.append([])
        result.outputs.append([])
        gradients: list = []  # gradients[b][k], of batch b for stage k
        then: list = []  # then[b][k], the weights of stage k in F(b)

        def backward(k, b, gradients=gradients, then=then):
            g = gradients[b][k]
            if tau[k] and compensate:
                g = [
                    None
                    if a is None
                    else _dense(a) + compensate * _dense(a) ** 2 * (now - old)
                    for a, now, old in zip(g, weights[k], then[b][k])
                ]
            set_rate(k)
            apply(optimizers[k], g, weights[k])

        for t, batch in enumerate(batches):
            now_at = epoch, t
            if order == "update_first":
                for k in range(K):
                    if d[k] > 0 and t >= d[k]:
                        backward(k, t - d[k])
            today = [[np.array(w) for w in stage] for stage in weights]
            if predict:
                for k in range(K):
                    set_rate(k)
                    ahead(optimizers[k], weights[k], min(t, tau[k]))
            then.append([[np.array(w) for w in stage] for stage in weights])
            value, outputs, gradient = _back_propagate(
                model, stages, weights, batch, loss, shrink
            )
            gradients.append(gradient)
            for stage, values in zip(weights, today):
                for w, old in zip(stage, values):
                    w.assign(old)
            for k in range(K):
                if (order == "forward_first" or d[k] == 0) and t >= d[k]:
                    backward(k, t - d[k])
            result.losses[-1].append(value)
            result.outputs[-1].append(outputs)
        for k in range(K):  # drain
            for b in range(max(0, n - d[k]), n):
                backward(k, b)
        on_epoch_end()
    return result


def _back_propagate(model, stages, weights, batch, loss, beta):
    """One forward and the gradients for all stages, each as it is shrunk.

    A gradient is shrunk at each hop. Stage j's own loss starts at stage j,
    the compiled loss at stage K-1. So stage k descends

        L_k = sum_{j >= k} beta**(j-k) * own_j + beta**(K-1-k) * main
    """
    K = len(stages)
    x, y, sample_weight = (*batch, None)[:3]
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x, training=True)
        main = main_loss(loss, y, outputs, sample_weight)
        own = [own_loss(layers) for layers in stages]
        descended = [
            sum(beta ** (j - k) * own[j] for j in range(k, K))
            + beta ** (K - 1 - k) * main
            for k in range(K)
        ]
    whole = own_loss([model])
    assert abs(float(tf.add_n(own) - whole)) < 1e-5 * (1 + float(whole)), (
        "the stages do not hold all of the model's losses"
    )
    gradients = [tape.gradient(descended[k], weights[k]) for k in range(K)]
    arrays = [np.array(output) for output in keras.tree.flatten(outputs)]
    return float(main + tf.add_n(own)), arrays, gradients


def batch_sizes(batches) -> list[int]:
    return [len(keras.tree.flatten(batch)[0]) for batch in batches]
