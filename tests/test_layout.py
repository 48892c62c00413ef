"""The floors of the house, read from the imports of every module, lazy and type-checking ones included."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gsl_dist"
FLOORS = {
    "ground": {"calls", "errors", "config", "cache", "storage", "artefact", "codebook", "filters", "hits", "wire"},
    "maths": {"quantizers", "snap", "losses", "encoders", "fit", "sampling", "ranked"},
    "disk": {"data", "index", "evaluate"},
    "service": {"service"},
    "cluster": {"cluster"},
    "doors": {"cli", "client", "demo", "jobs", "measure", "plan", "report", "screen"},
}
BELOW = {
    "ground": set(),
    "maths": {"ground"},
    "disk": {"ground"},
    "service": {"ground", "disk"},
    "cluster": {"ground", "maths", "disk", "service"},
    "doors": {"ground", "maths", "disk", "service", "cluster", "doors"},
}
FORBIDDEN = {
    "ground": {"ray", "torch", "faiss"},
    "maths": {"ray", "faiss", "pyarrow"},
    "disk": {"ray", "torch"},
    "service": {"ray", "torch"},
    "cluster": set(),
    "doors": {"ray"},
}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module):
    """Every module that a file imports, wherever in it the import stands."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in TREES else node.module


def unit_of(module):
    """`gsl_dist.index.search` lies in the unit `index`."""
    return module.split(".")[1]


def floor_of(module):
    return next((floor for floor, units in FLOORS.items() if unit_of(module) in units), None)


MODULES = [module for module in TREES if module != "gsl_dist"]


def inner_imports(module):
    return [found for found in imports_of(module) if found.startswith("gsl_dist.")]


def test_every_module_has_a_floor():
    assert [module for module in MODULES if floor_of(module) is None] == []


def test_every_name_of_a_floor_is_a_module():
    assert set(itertools.chain(*FLOORS.values())) == {unit_of(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_floor_imports_only_floors_below(module):
    own = floor_of(module)
    # Within one floor the ground and the siblings of a unit may build on each other; cycles are held off elsewhere.
    allowed = BELOW[own] | {own}
    assert [found for found in inner_imports(module) if floor_of(found) not in allowed] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_floor_imports_what_is_not_its_trade(module):
    outer = {found.split(".")[0] for found in imports_of(module)}
    assert outer & FORBIDDEN[floor_of(module)] == set()


def test_the_package_itself_imports_only_the_ground():
    assert {floor_of(found) for found in inner_imports("gsl_dist")} == {"ground"}


def test_no_module_imports_itself_through_others():
    edges = {module: set(inner_imports(module)) & set(TREES) - {module} for module in MODULES}
    left = dict(edges)
    while free := [module for module, needs in left.items() if not needs & set(left)]:
        for module in free:
            del left[module]
    assert left == {}, "these import each other in a circle"


def test_nothing_imports_pickle():
    bad = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert {m: found for m in TREES if (found := {name.split(".")[0] for name in imports_of(m)} & bad)} == {}


def test_no_drawer_for_odds_and_ends():
    drawers = {"util", "utils", "common", "helper", "helpers", "misc"}
    assert [module for module in TREES if set(module.split(".")) & drawers] == []


def test_files_have_at_most_500_lines():
    lengths = {str(path): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def test_functions_have_at_most_60_lines():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [(module, node) for module in TREES for node in ast.walk(TREES[module]) if isinstance(node, kinds)]
    assert [(m, f.name) for m, f in functions if f.end_lineno - f.lineno + 1 > 60] == []


@pytest.mark.parametrize("module", ["gsl_dist", "gsl_dist.client"])
def test_importing_a_door_loads_no_engine(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'faiss'}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("gsl_dist.cluster.build", {"torch", "numba", "scipy"}),
        ("gsl_dist.cluster.codebook", {"pytorch_metric_learning", "numba", "faiss"}),
        ("gsl_dist.cluster.match", {"torch", "numba", "scipy"}),
        ("gsl_dist.cluster.encode", {"pytorch_metric_learning", "numba", "faiss"}),
    ],
)
def test_workers_load_no_library_that_they_have_no_use_for(module, heavy):
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert ran.stdout.strip() == "[]"


def test_test_files_have_names_of_their_own():
    names = [path.name for path in PACKAGE.parent.joinpath("tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
