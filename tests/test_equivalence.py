"""Every combination that people train with equals `model.fit`.

Each row of `TABLE` is a model, its number of stages, a kind of data, an
optimizer and a callback; all but the optimizers are in `equivalence_cases.py`.
Every one of these is in some row, and no two of them are often together.

With `delay=0` a row must leave what `model.fit` leaves: the weights, the
optimizer's state, History, what callbacks wrote to files, and every call of
every hook of a callback, in order, with its index and its logs. Weights equal
as `matching.py` says, other numbers to 1e-5.

One kind of data is not given to both alike. Where the number of batches is
unknown (`unknown`), Keras learns that an epoch has ended from a batch that is
not there: once an epoch it calls `on_train_batch_begin` for it, counts a step
of the optimizer for it and draws random numbers. Here only batches that are
there count. So `model.fit` gets the same batches as a data set that knows its
length, and the row says that not knowing it changes nothing.

With `delay=2` weights, the loss in History and what callbacks do after epochs
must equal those of `reference.py`, which is given the batches of `model.fit`.
Left out are rows whose callback acts on batches or on what an optimizer keeps
(`NOT_LATE`): a sequential reference says nothing of when they are called.
"""

from typing import NamedTuple

import h5py
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from equivalence_cases import BATCH, CALLBACKS, DATA, MODELS, make_case
from matching import assert_same_weights

import fdg_keras


def _of(kind, rate=0.01, **arguments):
    return lambda: kind(rate, **arguments)


def _sgd(**arguments):
    return _of(keras.optimizers.SGD, 0.05, **arguments)


_o = keras.optimizers
OPTIMIZERS = {
    "sgd": _sgd(),
    "momentum": _sgd(momentum=0.9),
    "nesterov": _sgd(momentum=0.9, nesterov=True),
    "schedule": lambda: _o.SGD(_o.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "cosine": lambda: _o.Adam(
        _o.schedules.CosineDecay(0.0, 5, warmup_target=0.02, warmup_steps=2)
    ),
    "clipnorm": _sgd(clipnorm=0.05),
    "clipvalue": _sgd(clipvalue=0.01),
    "decay": _sgd(momentum=0.5, weight_decay=0.1),
    "ema": _sgd(use_ema=True, ema_momentum=0.7),
    "ema-over": _of(_o.Adam, use_ema=True, ema_overwrite_frequency=2),
    "steps": _sgd(momentum=0.9, gradient_accumulation_steps=2),
    "scaled": _of(_o.RMSprop, loss_scale_factor=8.0),
    "adam": _of(_o.Adam),
    "amsgrad": _of(_o.Adam, amsgrad=True, clipnorm=0.5),
    "adamw": _of(_o.AdamW, weight_decay=0.1),
    "adamax": _of(_o.Adamax),
    "nadam": _of(_o.Nadam),
    "rmsprop": _of(_o.RMSprop),
    "rmsprop-c": _of(_o.RMSprop, centered=True, momentum=0.5),
    "adagrad": _of(_o.Adagrad),
    "adadelta": _of(_o.Adadelta, 1.0),
    "adafactor": _of(_o.Adafactor),
    "ftrl": _of(_o.Ftrl, l1_regularization_strength=0.01),
    "lion": _of(_o.Lion, 0.001),
    "lamb": _of(_o.Lamb),
    "muon": _of(_o.Muon),
    "free": _of(_o.ScheduleFreeAdamW),
}

# model        stages data   optimizer  callback
TABLE = """
mlp            2 shuffled   sgd        checkpoint
mlp            2 classes    adagrad    csv
mlp            2 split      rmsprop    plateau
mlp            3 tensors    lamb       best
mlp            4 dataset    sgd        csv
plain_mlp      3 arrays     adam       step
conv           3 dataset    momentum   step
plain_mlp      3 turning    muon       none
plain_mlp      2 val-steps  adafactor  scheduler
plain_mlp      4 weights    lion       lambda
plain_mlp      2 torch      adam       none
plain_mlp      2 val        ema        swap
plain_mlp      2 later      ema        swap-e
plain_mlp      3 arrays     momentum   warm-up
plain_mlp      2 dataset    free       none
conv           2 dataset    nesterov   checkpoint
conv           2 workers    momentum   shrink
gru            2 unknown    adadelta   stopping
gru            2 weights    nadam      csv
attention      2 generator  adamw      backup
raw_operations 2 dataset    lamb       none
two_inputs     2 val-list   adamax     plateau
two_inputs     3 dataset    decay      none
named          2 arrays     cosine     board-b
named          2 dataset    amsgrad    scheduler
named          2 weights    rmsprop-c  checkpoint
named          2 sequence   clipvalue  lambda
shared         2 steps      steps      none
shared         2 sequence   clipnorm   none
nested         2 arrays     adamw      predict
frozen         2 later      ema-over   best
frozen         3 weights    adam       shrink
frozen_end     2 arrays     steps      lambda
activity       2 split-w    ftrl       none
gru            3 tensors    adamw      none
custom         2 val        schedule   csv
custom         2 sequence   muon       none
weightless     3 workers    scaled     backup
raw_operations 2 generator  cosine     batches
integers       2 val-freq   rmsprop    stopping
frozen         2 overflow   clipvalue  nan
loaded         2 arrays     adam       board
cloned         2 unknown    nesterov   none
bfloat16       2 arrays     adam       none
"""


class Row(NamedTuple):
    model: str
    stages: str
    data: str
    optimizer: str
    callback: str

    def __str__(self):
        return "-".join(self)

    def compiled_case(self):
        case = make_case(self.model)
        model, optimizer = case.model, OPTIMIZERS[self.optimizer]()
        model.compile(optimizer, case.loss, metrics=case.metrics)
        if self.optimizer == "free":
            # Its slots start as the weights; built late, as `model.fit`
            # builds it, they start as zeros, and the weights jump.
            optimizer.build(model.trainable_variables)
        return case

    def trainer(self, case, delay):
        K = int(self.stages)
        splits = case.cuts[K] if K > 1 else 1
        return fdg_keras.Trainer(case.model, splits, delay=delay)

    def fit(self, fitted, case, folder, *more, **arguments):
        folder.mkdir(exist_ok=True)
        keras.utils.set_random_seed(1)
        given = {"epochs": 2, "verbose": 0} | DATA[self.data](case) | arguments
        added = CALLBACKS[self.callback](folder)
        return fitted.fit(**given, callbacks=[added, *more])


ROWS = [Row(*line.split()) for line in TABLE.strip().splitlines()]


def _recording(name):
    def hook(self, *args, **kwargs):
        *index, logs = (*args, *kwargs.values())
        self.events.append(((name, *index), dict(logs or {})))
        getattr(super(EventLog, self), name)(*args, **kwargs)

    return hook


class EventLog(keras.callbacks.Callback):
    """Writes down every call of a hook, with its index and its logs."""

    def __init__(self):
        super().__init__()
        self.events = []

    for _name in vars(keras.callbacks.Callback):
        if _name.startswith("on_"):
            locals()[_name] = _recording(_name)


def without_unended_batches(events):
    """The library, too, begins one to learn that there is none."""
    ends = {"on_epoch_end", "on_test_end"}
    kept = []
    for event in events:
        while event[0][0] in ends and kept[-1][0][0].endswith("batch_begin"):
            kept.pop()
        kept.append(event)
    return kept


def assert_close(found, wanted, context=""):
    keras.tree.assert_same_structure(found, wanted)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=context)


def assert_same_events(found, wanted, known=True):
    if not known:  # how many batches there are
        found, wanted = map(without_unended_batches, (found, wanted))
    outlines = [[(at, list(logs)) for at, logs in e] for e in (found, wanted)]
    assert outlines[0] == outlines[1]
    for (at, logs), (_, expected) in zip(found, wanted):
        assert_close(logs, expected, str(at))


def assert_same_history(found, wanted):
    assert list(found.history) == list(wanted.history)
    assert found.epoch == wanted.epoch
    if found.params["steps"]:  # or the length is unknown
        assert found.params == wanted.params
    assert_close(found.history, wanted.history)


def files_in(folder):
    """What callbacks wrote: names of files, and the numbers in them."""
    found = {}
    for path in folder.rglob("*.*"):
        if "tfevents" in path.name:
            found |= summaries(path)
        elif path.suffix == ".h5":
            found |= arrays_in(path)
        elif path.suffix == ".csv":
            found[path.name] = np.genfromtxt(path, delimiter=",")
        else:
            found[path.name] = 0
    return found


def arrays_in(path):
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[f"{path.name}/{name}"] = np.array(item)

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def summaries(path):
    """Scalars by tag and step; of histograms and graphs only the tags."""
    found = {}
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            key = f"{path.parent.name}/{value.tag}/{event.step}"
            array = tf.make_ndarray(value.tensor)
            is_scalar = array.dtype == "float32" and array.ndim == 0
            found[key] = array if is_scalar else 0
    return found


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_without_delay_it_is_model_fit(row, tmp_path):
    case, expected = row.compiled_case(), row.compiled_case()
    log, log_of_keras = EventLog(), EventLog()
    found, wanted = tmp_path / "found", tmp_path / "wanted"
    history = row.fit(row.trainer(case, 0), case, found, log)
    if row.data == "unknown":  # See the top of this file.
        row = row._replace(data="dataset")
    history_of_keras = row.fit(expected.model, expected, wanted, log_of_keras)
    known = history.params["steps"] is not None
    assert_same_events(log.events, log_of_keras.events, known)
    assert_same_history(history, history_of_keras)
    assert_same_weights(case.model, expected.model)
    assert_same_weights(case.model.optimizer, expected.model.optimizer)
    assert_close(files_in(found), files_in(wanted))


def batches_of(row, folder):
    """Per epoch, what `model.fit` gives to `train_step`; trains nothing."""
    case, epochs = row.compiled_case(), []
    case.model.compile(loss=case.loss, run_eagerly=True)
    case.model.train_step = lambda batch: (
        epochs[-1].append(batch) or {"loss": tf.constant(0.0)}
    )
    case.model.get_metrics_result = dict
    case.model.evaluate = lambda **_: {}
    begin = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epochs.append([])
    )
    row._replace(callback="none").fit(case.model, case, folder, begin)
    return epochs


def train_reference(case, row, groups, epochs, callback):
    """Returns the loss of each epoch, as History has it."""
    loss = case.loss
    if isinstance(loss, dict):
        loss = [
            keras.losses.MeanSquaredError()
            if loss[name] == "mse"
            else loss[name]
            for name in sorted(loss)
        ]
    model, optimizers, losses = case.model, None, []
    hooks = keras.callbacks.CallbackList([callback], model=model)
    hooks.on_train_begin()
    for epoch, batches in enumerate(epochs):
        hooks.on_epoch_begin(epoch)
        if row.callback in ("scheduler", "plateau") and optimizers:
            for optimizer in filter(None, optimizers):
                optimizer.learning_rate = float(model.optimizer.learning_rate)
        result = reference.train(
            model,
            groups,
            [
                # Sample weights are the same for all outputs.
                (x, keras.tree.flatten(y), *keras.tree.flatten(weights)[:1])
                for x, y, *weights in batches
            ],
            loss,
            model.optimizer,
            optimizers=optimizers,
        )
        optimizers = result.optimizers
        losses += result.epoch_losses
        hooks.on_epoch_end(epoch, {"loss": losses[-1]})
        if model.stop_training:
            break
    for optimizer, weights in zip(
        optimizers, reference.weights_of_groups(model, groups)
    ):
        if optimizer:
            optimizer.finalize_variable_values(weights)
    hooks.on_train_end()
    return losses


#: Callbacks that act on batches or on averages of weights, and `nan`, which
#: stops in the middle of an epoch.
NOT_LATE = {"step", "warm-up", "swap", "swap-e", "nan"}


def has_reference(row):
    # Eagerly, bfloat16 is rounded after each operation.
    return row.callback not in NOT_LATE and row.model != "bfloat16"


@pytest.mark.parametrize("row", filter(has_reference, ROWS), ids=str)
def test_with_delay_it_is_the_reference(row, tmp_path):
    case, expected = row.compiled_case(), row.compiled_case()
    trainer = row.trainer(case, 2)
    history = row.fit(trainer, case, tmp_path / "found")
    if row.data == "unknown":  # See the top of this file.
        row = row._replace(data="dataset")
    losses = train_reference(
        expected,
        row,
        [stage.layers for stage in trainer.plan.stages],
        batches_of(row, tmp_path / "batches"),
        CALLBACKS[row.callback](tmp_path),
    )
    assert_close(history.history["loss"], losses)
    assert_same_weights(case.model, expected.model)


def test_nothing_is_left_to_train(tmp_path):
    """`initial_epoch` is the number of epochs: hooks only, in both."""
    row = Row("mlp", "2", "arrays", "sgd", "csv")
    cases, logs, histories = [], [], []
    for delay in (0, None):
        case, log = row.compiled_case(), EventLog()
        fitted = case.model if delay is None else row.trainer(case, delay)
        folder = tmp_path / str(delay)
        histories.append(row.fit(fitted, case, folder, log, initial_epoch=2))
        cases.append(case)
        logs.append(log.events)
    assert not histories[0].history
    assert_same_events(*logs)
    assert_same_history(*histories)
    assert_same_weights(*(case.model for case in cases))
    assert_same_weights(cases[0].model, row.compiled_case().model)


def test_the_table_covers_everything():
    for column, kinds in enumerate((DATA, OPTIMIZERS, CALLBACKS), start=2):
        assert {row[column] for row in ROWS} == set(kinds)
    assert {row.model for row in ROWS} >= set(MODELS)
    assert len(ROWS) >= 40
    assert set(CALLBACKS) > NOT_LATE


def test_training_goes_on_from_a_backup(tmp_path):
    """`BackupAndRestore` says in `on_train_begin` where to go on."""
    row = Row("plain_mlp", "2", "arrays", "adam", "backup")
    cases, logs, histories = [], [], []
    for delay in (0, None):
        for epochs in (1, 3):
            case, log = row.compiled_case(), EventLog()
            fitted = case.model if delay is None else row.trainer(case, delay)
            history = row.fit(
                fitted, case, tmp_path / str(delay), log, epochs=epochs
            )
        cases.append(case)
        logs.append(log.events)
        histories.append(history)
    assert histories[0].epoch == [1, 2]
    assert_same_events(*logs)
    assert_same_history(*histories)
    assert_same_weights(*(case.model for case in cases))
    assert_same_weights(*(case.model.optimizer for case in cases))


def test_hooks_of_evaluate_and_predict():
    row = Row("named", "2", "arrays", "sgd", "none")
    case, logs = row.compiled_case(), [EventLog(), EventLog()]
    for fitted, log in zip((row.trainer(case, 0), case.model), logs):
        arguments = {"batch_size": BATCH, "callbacks": [log], "verbose": 0}
        fitted.evaluate(case.x, case.y, **arguments)
        fitted.predict(case.x, **arguments)
    assert_same_events(*(log.events for log in logs))
