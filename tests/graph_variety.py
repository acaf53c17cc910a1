"""How various the random models of a test are.

Examples that are all alike test little, and nothing else would say so: what is
drawn may be left out of the model, or always be on one side of a cut.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

from fdg_keras.slicing import Graph, cut_graph

#: Of so many examples at least must have ...
LEAST = {
    "a trained layer that is called twice": 0.1,
    "such a layer, and a cut": 0.08,
    "several inputs": 0.2,
    "several outputs": 0.2,
    "three stages": 0.2,
    "a tensor that skips a stage": 0.1,
    "a tensor of integers or booleans over a cut": 0.05,
}
#: Of fewer examples nothing can be said.
ENOUGH = 100
#: Classes of layers and operations in all examples together.
CLASSES = 40


class Variety:
    """What the examples of a test had in them.

    Attributes:
        examples: How many there were.
        having: How many of them had each of `LEAST`.
        classes: How many had layers and operations of each class.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.examples = 0
        self.having: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()

    def add(self, graph: Graph, cuts: Sequence[int]) -> None:
        """Counts a model that is cut there."""
        self.examples += 1
        self.classes.update({type(n.operation).__name__ for n in graph.nodes})
        parts = cut_graph(graph, cuts)
        calls = Counter(
            id(node.operation)
            for node in graph.nodes
            if getattr(node.operation, "trainable_variables", None)
        )
        shared = max(calls.values(), default=0) > 1
        over = {value for part in parts for value in part.receives}
        dtypes = {graph.symbols[value].dtype for value in over}
        found = (
            shared,
            shared and len(parts) > 1,
            len(graph.inputs) > 1,
            len(graph.outputs) > 1,
            len(parts) > 2,
            any(set(p.receives) & set(p.sends) for p in parts[:-1]),
            not all(dtype.startswith("float") for dtype in dtypes),
        )
        self.having.update(what for what, has in zip(LEAST, found) if has)

    def check(self) -> None:
        """Raises `AssertionError` if the examples were too much alike."""
        if self.examples < ENOUGH:
            return
        found = {what: self.having[what] / self.examples for what in LEAST}
        short = {w: share for w, share in found.items() if share < LEAST[w]}
        assert not short, f"too few of {self.examples} examples have {short}"
        assert len(self.classes) >= CLASSES, sorted(self.classes)

    def of(self, test: Callable[[], None]) -> Callable[[], None]:
        """Has a test of many examples, which it adds, check them at its end."""

        # A test of its own: one that is known as Hypothesis' would be run
        # without what is added here.
        def checked() -> None:
            self.clear()
            test()
            self.check()

        functools.update_wrapper(checked, test, updated=())
        del checked.__wrapped__  # Its arguments are Hypothesis' business.
        return checked
