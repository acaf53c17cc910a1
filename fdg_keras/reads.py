"""What the backwards of a stage read, for any stage: tables of nodes' reads."""

from collections.abc import Iterator, Sequence

import numpy as np

from fdg_keras.profiles import Profile
from fdg_keras.slicing import Graph


def reads(
    graph: Graph,
    profiles: Sequence[Profile],
    sizes: Sequence[int],
    made_within: bool,
) -> np.ndarray:
    """Returns what backwards read, as rows of a table.

    Args:
        graph: The model.
        profiles: Of its nodes.
        sizes: Of its values, in bytes.
        made_within: Whether only what a node of the same stage has made.

    Returns:
        `[reads, 4]`: the node that reads, in order; bytes; and a and b, such
        that it counts for stages that begin at node a < start <= b: a node
        that has read the same before is not in the stage.
    """
    rows = []
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    same = _viewed(graph, profiles)

    def add(position: int, value: int) -> None:
        value = same.get(value, value)
        after, until = last.get(value, -1), position
        if made_within:
            until = min(until, made.get(value, -1))
        last[value] = position
        if after < until:
            rows.append((position, sizes[value], after, until))

    for position, (node, found) in enumerate(zip(graph.nodes, profiles)):
        inputs = list(dict.fromkeys(node.inputs))
        for value, keeps in zip(inputs, found.keeps_inputs):
            if keeps:
                add(position, value)
        made.update((value, position) for value in node.outputs)
        for value, keeps in zip(node.outputs, found.keeps_outputs):
            if keeps:
                add(position, value)
        rows.append((position, found.keeps_bytes, -1, position))
    return np.array(rows, int).reshape(-1, 4)


def reads_if_cheap_runs_again(
    graph: Graph, profiles: Sequence[Profile], sizes: Sequence[int]
) -> np.ndarray:
    """Returns what is kept if all nodes that are cheap run again.

    Of other nodes what `"selective"` keeps of each by itself, and a stage's
    inputs, as far as what is read is made of them. `"selective"` looks at all
    operations of a stage together, and at whether it pays: that is less in most
    stages, or a little more.

    Arguments and result as of `reads`.
    """
    rows: list[tuple[int, int, int, int]] = []
    made: dict[int, int] = {}
    done: dict[int, int] = {}  # until when a value is kept
    same = _viewed(graph, profiles)

    def keep(at: int, value: int) -> None:
        left = [(value, at)]
        while left:
            value, until = left.pop()
            value = same.get(value, value)
            maker = made.get(value, -1)
            again = maker >= 0 and profiles[maker].cheap
            # Of a stage that begins behind its maker it is an input.
            after = maker if again else -1
            if done.get(value, -1) >= until:
                continue
            if after < until:
                after = max(after, done.get(value, -1))
                rows.append((at, sizes[value], after, until))
            if again:
                read = graph.nodes[maker].inputs
                left += [(one, min(until, maker)) for one in read]
            done[value] = until

    for position, (node, found) in enumerate(zip(graph.nodes, profiles)):
        inputs = list(dict.fromkeys(node.inputs))
        made.update((v, position) for v in node.outputs if v not in same)
        if found.cheap:
            makes = any(found.keeps_outputs) or found.keeps_bytes > 0
            for value, keeps in zip(inputs, found.keeps_inputs):
                if keeps or makes:
                    keep(position, value)
            continue
        for value, keeps in zip(inputs, found.selects_inputs):
            if keeps:
                keep(position, value)
        for value, keeps in zip(node.outputs, found.selects_outputs):
            if keeps:
                keep(position, value)
        rows.append((position, found.selects_bytes, -1, position))
    return np.array(rows, int).reshape(-1, 4)


def _viewed(graph: Graph, profiles: Sequence[Profile]) -> dict[int, int]:
    """Returns of each value that is a view what it is a view of."""
    found: dict[int, int] = {}
    for node, profile in zip(graph.nodes, profiles):
        inputs = list(dict.fromkeys(node.inputs))
        for value, of in zip(node.outputs, profile.views):
            if of is not None:
                found[value] = found.get(inputs[of], inputs[of])
    return found


def fed(graph: Graph, sizes: Sequence[int]) -> np.ndarray:
    """Returns which of the model's inputs nodes read, as rows of a table.

    Args:
        graph: The model.
        sizes: Of its values, in bytes.

    Returns:
        `[reads, 4]`, as of `reads`: each stage is fed what it reads.
    """
    rows = []
    last: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        for value in {*node.inputs} & {*graph.inputs}:
            rows.append((position, sizes[value], last.get(value, -1), position))
            last[value] = position
    return np.array(rows, int).reshape(-1, 4)


def inputs_read(
    graph: Graph, profiles: Sequence[Profile], sizes: Sequence[int]
) -> np.ndarray:
    """Returns what backwards need of a stage's inputs to replay it.

    Args:
        graph: The model.
        profiles: Of its nodes.
        sizes: Of its values, in bytes.

    Returns:
        `[reads, 4]`, as of `reads`. The node is the first that reads what
        depends on the input: a stage that ends before it does not keep it.
    """
    never = len(graph.nodes)
    first = [never] * len(graph.symbols)  # to read what depends on a value
    uses: list[list[tuple[int, int]]] = [[] for _ in first]
    made = [-1] * len(first)
    for position in reversed(range(never)):
        node, found = graph.nodes[position], profiles[position]
        run = min((first[value] for value in node.outputs), default=never)
        beside = any(found.keeps_outputs) or found.keeps_bytes or found.unsized
        if found.replays and beside:
            run = position
        inputs = dict.fromkeys(node.inputs)
        for value, keeps in zip(inputs, found.keeps_inputs):
            use = position if keeps else run
            first[value] = min(first[value], use)
            uses[value].append((use, position))
        for value in node.outputs:
            made[value] = position
    rows = []
    for value, after in enumerate(made):
        for use, position in sorted(uses[value]):
            if use < never and after < position:
                rows.append((use, sizes[value], after, position))
            after = max(after, position)
    return np.array(sorted(rows), int).reshape(-1, 4)


def by_last_node(table: np.ndarray, start: int, count: int) -> np.ndarray:
    """Returns bytes `[nodes]` of stages from `start` to each node."""
    at, sizes, after, until = table.T
    counts = (after < start) & (start <= until)
    return np.cumsum(np.bincount(at[counts], sizes[counts], count))


def by_first_node_of(
    table: np.ndarray, count: int, stops: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yields bytes `[nodes]` of stages from each node to a stop."""
    at, sizes, after, until = table.T
    changes = np.zeros(count + 1)  # from each node to the next
    found = changes[:-1].copy()
    done = 0
    for stop in stops:
        rows = slice(done, int(np.searchsorted(at, stop, "right")))
        if rows.start < rows.stop:
            np.add.at(changes, after[rows] + 1, sizes[rows])
            np.subtract.at(changes, until[rows] + 1, sizes[rows])
            found = np.cumsum(changes[:-1])
            done = rows.stop
        yield found
