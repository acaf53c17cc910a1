"""A model lent to its stages, and given back."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from fdg_keras.placement import Relocation
from fdg_keras.threads import uninterrupted
from fdg_keras.watch import Watch, may_be_of_loss

# Where a Keras model keeps what it has compiled.
_FUNCTIONS = ("train_function", "test_function", "predict_function")


class Loan:
    """A model while its variables are on the devices of its stages.

    Use it as a context manager; contexts nest. Within the outermost one the
    model cannot be trained by others, what it had compiled is set aside, and
    the workers its stages are on are looked after. When that one ends, all is
    as it was, with the values that variables have then; or, if a worker was
    lost, with those of the last `save`, and a `ConnectionError` says so.

    Args:
        model: The model.
        devices: The device of each stage.
        forget: Called if a worker was lost, to let go of what is there.

    Attributes:
        watch: Looks after the workers.
        relocation: Moves variables, and keeps which are moved.
        saved: Whether there was a `save` since the loan began.
        jit_compile: Whether the model was compiled for XLA.
    """

    def __init__(
        self,
        model: keras.Model,
        devices: Sequence[str],
        forget: Callable[[], None],
    ):
        self._model = model
        self._forget = forget
        self.watch = Watch(devices)
        self.relocation = Relocation(may_be_lost=self.watch.is_needed)
        self.saved = False
        self.jit_compile = False
        self._functions: dict[str, Any] = {}

    def save(self) -> None:
        """Keeps what variables hold, in case a worker is lost later."""
        if self.watch.is_needed:
            self.relocation.save()
            self.saved = True

    def __enter__(self) -> "Loan":
        try:
            with uninterrupted():
                self._enter()
        except KeyboardInterrupt:
            # Put off until now, and so it is not the `with` block that leaves.
            self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        model = self._model
        if not self.relocation.is_away:
            check_idle(model)  # Others may have its variables.
            self.watch.__enter__()
            self.saved = False
            # What the model compiled, it compiled for its variables at home;
            # and XLA refuses variables that are spread over devices.
            self.jit_compile = bool(model.jit_compile)
            self._functions = {n: getattr(model, n) for n in _FUNCTIONS}
            self._set_functions(dict.fromkeys(_FUNCTIONS), False)
            vars(model)["make_train_function"] = _refuse_to_train
        try:
            self.relocation.__enter__()
        except tf.errors.OpError as error:
            # A worker was lost while the model was at home.
            loss = self._abandon()
            self._settle()
            raise (loss or error) from error

    def __exit__(self, *details: Any) -> None:
        error = details[1] if details else None
        with uninterrupted():
            loss = self._leave(error)
            if not self.relocation.is_away:
                self._settle()
        if loss is None:
            return
        if error is None or may_be_of_loss(error):
            raise loss from error
        error.add_note(str(loss))

    def _leave(self, error: BaseException | None) -> ConnectionError | None:
        """Brings variables home; returns what is to be said of lost workers."""
        fails = self.watch.is_needed and error is not None
        if fails and self.watch.find_loss() is not None:
            return self._abandon()
        try:
            self.relocation.__exit__()
        except tf.errors.OpError:
            loss = self._abandon()
            if loss is None:
                self._settle()
                raise
            return loss
        return None

    def _abandon(self) -> ConnectionError | None:
        """Gives up what is on the workers, with one of them lost.

        All variables get the values they had at the last `save`, so that they
        belong together.
        """
        loss = self.watch.find_loss()
        if loss is not None:
            loss.add_note(
                "The model holds the weights and slots of the end of the last "
                "epoch, or of the begin of `fit` if none has ended."
            )
        self.relocation.abandon()
        # While calls to lost workers fail at once, and do not block.
        self._forget()
        return loss

    def _settle(self) -> None:
        """Undoes what else was done for variables to be away."""
        self.watch.__exit__()
        self._set_functions(self._functions, self.jit_compile)
        vars(self._model).pop("make_train_function", None)

    def _set_functions(self, functions: dict, jit_compile: bool) -> None:
        for name, function in functions.items():
            setattr(self._model, name, function)
        self._model.jit_compile = jit_compile


def check_idle(model: keras.Model) -> None:
    """Checks that a model is not in stages now, to be used by others.

    Raises:
        ValueError: If it is.
    """
    if vars(model).get("make_train_function") is _refuse_to_train:
        _refuse_to_train()


def _refuse_to_train(force: bool = False) -> None:
    raise ValueError(
        "A model cannot be trained within `fdg_keras.fit`, by a callback or "
        "another thread say, nor run by another `Trainer`: its variables are "
        "on the devices of their stages. Expected that to be done before or "
        "after it; `evaluate` and `predict` of the model and of its `Trainer` "
        "may be called. Received: a call meanwhile"
    )
