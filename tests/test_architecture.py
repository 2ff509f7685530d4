"""The layers, the torch-free units and the size ceilings of DESIGN, read from the source by its syntax tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pipeline"
LAYERS = [
    {
        "errors",
        "log",
        "geometry",
        "durations",
        "config",
        "rungs",
        "run_files",
        "sizes",
        "plan",
        "allocation",
        "rank_place",
    },
    {"artifacts", "saved_config", "parallel", "io", "stop_signals", "requeue"},
    {"launching", "prediction_record", "run_record", "store", "synthetic", "synthetic_dicom", "datasets"},
    {"preprocessing", "status"},
    {"slabs"},
    {"kernels"},
    {"networks", "losses", "sampling"},
    {"planning", "inference", "evaluation"},
    {"training"},
    {"doctor", "assessment"},
    {"api"},
    {"chain", "job_scripts"},
    {"cli"},
    {"__main__"},
]
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units}
ABOVE_AND_TORCH_FREE = {"evaluation", "assessment", "api", "chain", "job_scripts", "cli"}
TORCH_FREE = {unit for units in LAYERS[:4] for unit in units} | ABOVE_AND_TORCH_FREE
# L0 is pure data; a unit of it may use these, in this order, because each stands on the one before.
SAME_LAYER_ALLOWED = {
    ("geometry", "errors"),
    ("plan", "errors"),
    ("plan", "geometry"),
    ("plan", "rungs"),
    ("rungs", "errors"),
    ("rungs", "geometry"),
    ("durations", "errors"),
    ("rank_place", "errors"),
    ("requeue", "stop_signals"),
    ("allocation", "rank_place"),
    ("allocation", "sizes"),
    ("config", "durations"),
    ("config", "errors"),
    ("config", "sizes"),
    ("log", "errors"),
}
SAME_LAYER_ALLOWED |= {("parallel", "artifacts"), ("io", "artifacts"), ("saved_config", "artifacts")}
HEAVY = {"torch", "monai", "pytorch_lightning", "lightning"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The top-level module or sub-package that a file belongs to."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""
            if node.module == "pipeline":
                yield from (f"pipeline.{alias.name}" for alias in node.names if alias.name != "__version__")


def imports_when_loaded(tree: ast.Module) -> Iterator[str]:
    """Modules imported at import time: those outside functions and outside `if TYPE_CHECKING`."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_modules(node)
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature's docstring."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1


@pytest.fixture(params=MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def module(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_every_unit_has_a_layer() -> None:
    assert {unit_of(path) for path in MODULES} - {"__init__"} == set(LAYER_OF)


def test_the_guide_for_contributors_names_the_same_units_from_the_lowest_layer_up() -> None:
    rule = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("**Layers.**")[1].split("\n- **")[0]
    named = [unit for words in re.findall("`([^`]*)`", rule) for unit in words.split()]
    assert sorted(named) == sorted(LAYER_OF)
    assert [LAYER_OF[unit] for unit in named] == sorted(LAYER_OF[unit] for unit in named)


def test_imports_go_down_only(module: Path) -> None:
    unit = unit_of(module)
    if unit == "__init__":
        return
    for name in imported_modules(ast.parse(module.read_text())):
        if not name.startswith("pipeline.") or name.split(".")[1] == unit:
            continue
        other = name.split(".")[1]
        allowed = LAYER_OF[other] < LAYER_OF[unit] or (unit, other) in SAME_LAYER_ALLOWED
        assert allowed, f"{unit} (layer {LAYER_OF[unit]}) imports {name} (layer {LAYER_OF[other]})"


def test_torch_free_units_do_not_import_torch(module: Path) -> None:
    if unit_of(module) not in TORCH_FREE:
        return
    tree = ast.parse(module.read_text())
    names = imports_when_loaded(tree) if unit_of(module) in ("api", "chain", "cli") else imported_modules(tree)
    assert not {name.split(".")[0] for name in names} & HEAVY


def test_torch_is_not_loaded_by_the_torch_free_units() -> None:
    names = [
        ".".join(["pipeline", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in MODULES
        if unit_of(path) in TORCH_FREE and path.stem != "__init__"
    ]
    code = f"import sys, {', '.join(names)}\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_files_and_functions_stay_readable(module: Path) -> None:
    source = module.read_text()
    tree = ast.parse(source)
    assert source.count("\n") <= MAX_FILE_LINES
    for function in functions(tree):
        assert code_lines(function) <= MAX_FUNCTION_LINES, function.name
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(named) <= MAX_PARAMETERS, function.name


def test_medians_stay_near_what_the_design_expects() -> None:
    sizes = sorted(path.read_text().count("\n") for path in MODULES if path.stem != "__init__")
    lengths = sorted(code_lines(f) for path in MODULES for f in functions(ast.parse(path.read_text())))
    assert sizes[len(sizes) // 2] <= 180
    assert lengths[len(lengths) // 2] <= 12


def test_every_module_and_public_name_says_what_it_is(module: Path) -> None:
    tree = ast.parse(module.read_text())
    assert ast.get_docstring(tree), "module docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    assert not [path for path in MODULES if path.name in FORBIDDEN_NAMES]
