"""Who may import whom: the ladder of modules, and a few fences."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "fdg_keras"

#: From the bottom up: a module imports only from those before it.
LADDER = [
    "delays",
    "schedules",
    "resources",
    "network",
    "simulation",
    "transforms",
    "threads",
    "sockets",
    "lookout",
    "_keras",
    "slicing",
    "balancing",
    "costs",
    "plan_pictures",
    "plan_records",
    "stage_plans",
    "plans",
    "planning",
    "placement",
    "vigil",
    "watch",
    "cluster",
    "clocks",
    "subgraphs",
    "mincut",
    "recompute",
    "liveness",
    "crossing",
    "corrections",
    "cuts",
    "boundaries",
    "linearize",
    "links",
    "probes",
    "data",
    "feeds",
    "optimizers",
    "validation",
    "stages",
    "checks",
    "objective",
    "keys",
    "profiles",
    "specs",
    "pieces",
    "laps",
    "profiling",
    "reads",
    "stashes",
    "homes",
    "loss_bytes",
    "memory",
    "room",
    "cutting",
    "expectations",
    "advice",
    "rates",
    "durations",
    "planner",
    "updates",
    "loops",
    "pipeline",
    "statistics",
    "timelines",
    "records",
    "callbacks",
    "feeding",
    "conductor",
    "taped",
    "emulation",
    "loans",
    "deployment",
    "hooks",
    "passes",
    "trainer",
    "worker",
    "__init__",
]


def imports(path):
    """The names of all modules that a file imports, at any level."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative import"
            found.add(node.module)
            # `from package import module`, too.
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def own_imports(name):
    """The modules of the package that one of them imports."""
    modules = {
        part.split(".")[1]
        for part in imports(PACKAGE / f"{name}.py")
        if part.startswith("fdg_keras.")
    }
    return modules & set(LADDER)


def top_level(path):
    return {name.partition(".")[0] for name in imports(path)}


def test_the_ladder_names_every_module():
    assert sorted(LADDER) == sorted(p.stem for p in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("name", LADDER)
def test_imports_go_down_the_ladder(name):
    above = LADDER[LADDER.index(name) :]
    assert not own_imports(name) & set(above)


def test_the_parser_sees_imports():
    """Or the tests of this file could not fail."""
    assert {"_keras", "slicing", "pipeline"} <= own_imports("trainer") | (
        own_imports("deployment")
    )
    assert "tensorflow" in top_level(PACKAGE / "links.py")


def is_private(module):
    if module.startswith("fdg_keras."):
        return False
    parts = module.split(".")
    return (
        parts[:2] in (["keras", "src"], ["tensorflow", "python"])
        or parts[0].startswith("tensorflow_")
        or any(part.startswith("_") and part != "__future__" for part in parts)
    )


@pytest.mark.parametrize("name", LADDER)
def test_private_names_are_imported_by_one_module_only(name):
    private = {m for m in imports(PACKAGE / f"{name}.py") if is_private(m)}
    assert bool(private) == (name == "_keras")


@pytest.mark.parametrize("name", [n for n in LADDER if n != "_keras"])
def test_private_attributes_are_only_those_of_self(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    private = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value) not in ("self", "cls")
    ]
    assert private == []


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("delays", {"tensorflow", "keras", "numpy", "threading"}),
        ("schedules", {"tensorflow", "keras", "numpy", "threading"}),
        ("resources", {"tensorflow", "keras", "numpy", "threading"}),
        ("network", {"tensorflow", "keras", "numpy", "threading"}),
        ("simulation", {"tensorflow", "keras", "threading"}),
        ("threads", {"tensorflow", "keras", "numpy", "fdg_keras"}),
        ("sockets", {"tensorflow", "keras", "numpy", "fdg_keras"}),
        ("worker", {"keras", "threading"}),
        ("subgraphs", {"keras", "threading"}),
        ("mincut", {"tensorflow", "keras", "threading", "fdg_keras"}),
        ("recompute", {"keras", "threading"}),
        ("crossing", {"keras", "threading"}),
        ("linearize", {"keras", "threading"}),
        ("links", {"keras", "threading"}),
        ("loops", {"threading"}),
        ("stages", {"threading"}),
    ],
)
def test_what_a_module_knows_nothing_of(name, packages):
    """Maths knows no threads, and threads know no Keras."""
    assert not top_level(PACKAGE / f"{name}.py") & packages


# `python -m fdg_keras.worker` is a program, which nothing imports.
@pytest.mark.parametrize("name", [n for n in LADDER if n != "worker"])
def test_flags_stay_out_of_the_library(name):
    assert not top_level(PACKAGE / f"{name}.py") & {"absl", "argparse"}


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "tests").glob("reference*.py")),
    ids=lambda path: path.stem,
)
def test_the_references_share_nothing_with_the_library(path):
    assert "fdg_keras" not in top_level(path)


@pytest.mark.parametrize("name", LADDER)
def test_the_library_imports_nothing_of_tests_and_trainers(name):
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert not top_level(PACKAGE / f"{name}.py") & (tests | {"trainers"})
