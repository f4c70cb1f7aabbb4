"""Imports point one way: cli -> bench -> pocket -> engine -> quant -> kernels, and down the engine's own storeys."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("kernels", "quant", "engine", "pocket", "bench", "cli")
# The engine's storeys, lowest first. A new file gets its place here; the more specific name wins.
ENGINE = (
    "errors checks sampling outcome request precision schedules noise kv_cache graphs tokens gpus formulas meter "
    "segments foreseen repeats device lock task outputs options terminal image_file picture png_metadata naming",
    "checkpoint",
    "layers next_token",
    "models",
    "families",
    "verbs run text prepare reading making room loaded",
    "plan kept_plans residency mover transfer forecast nvml budget limits allocator placing weights source hub pins "
    "checkpoint.convert",
    "engine worker loading outline choosing estimate arguments saving facts info",
    "timeline plot fits doctor",
    "commands",
)
STOREY = {f"engine.{name}": height for height, names in enumerate(ENGINE) for name in names.split()}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name inside it; "" is the package itself."""
    paths = [ROOT / "__init__.py", ROOT / "cli.py", *(path for top in TOP for path in (ROOT / top).rglob("*.py"))]
    return {dotted(path): path for path in paths if path.exists()}


def nodes(tree: ast.AST, late: bool) -> Iterator[ast.AST]:
    """Everything below `tree`; without `late`, what runs when the file is imported: no function bodies."""
    for node in ast.iter_child_nodes(tree):
        if late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from nodes(node, late)


def imports(path: Path, late: bool = True) -> Iterator[tuple[int, str, str]]:
    """(dots, module as written, name) of the imports in a file; name is "" for `import module`."""
    for node in nodes(ast.parse(path.read_text("utf-8")), late):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name, "") for alias in node.names)


def ours(importer: str, path: Path, late: bool = True) -> Iterator[str]:
    """The modules of the package that a file imports."""
    for dots, module, name in imports(path, late):
        if dots:
            package = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]
            base = package[: len(package) - (dots - 1)]
        elif module.split(".")[0] == "unipic_run":
            base, module = [], module.removeprefix("unipic_run").removeprefix(".")
        else:
            continue
        target = ".".join([*base, *filter(None, [module])])
        inner = f"{target}.{name}".strip(".")
        yield inner if inner in modules() else target


def storey(name: str) -> int | None:
    known = (STOREY.get(prefix) for prefix in (name, ".".join(name.split(".")[:2])))
    return next((height for height in known if height is not None), None)


def package_files() -> list[str]:
    return [name for name in modules() if name]


@pytest.mark.parametrize("name", package_files())
def test_imports_point_down(name):
    top = name.split(".")[0]
    for target in ours(name, modules()[name]):
        if not target:  # the root holds the version besides the public door
            names = {
                given for dots, module, given in imports(modules()[name]) if dots == name.count(".") + 1 and not module
            }
            assert top in ("cli", "bench", "pocket") or names == {"__version__"}, f"{name} imports the public door"
            continue
        other = target.split(".")[0]
        assert TOP.index(other) <= TOP.index(top), f"{name} imports {target}, which is above it"
        if None not in (heights := (storey(target), storey(name))):
            assert heights[0] <= heights[1], f"{name} imports {target}, which is above it"


def test_every_engine_file_has_a_storey():
    missing = [name for name in package_files() if name.startswith("engine.") and storey(name) is None]
    assert not missing, f"add {missing} to ENGINE in {Path(__file__).name}"


def test_no_cycles():
    TopologicalSorter({name: set(ours(name, path, late=False)) for name, path in modules().items() if name}).prepare()


@pytest.mark.parametrize("name", [name for name in package_files() if name.split(".")[0] == "kernels"])
def test_kernels_need_torch_triton_and_the_standard_library_only(name):
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    outside = {module.split(".")[0] for dots, module, _ in imports(modules()[name]) if not dots} - allowed
    assert not outside, f"{name} imports {outside}"


def test_imports_are_relative_inside_and_absolute_in_scripts():
    scripts = [path for name, path in modules().items() if name.split(".")[0] in ("cli", "bench")]
    scripts += (ROOT / "tests").rglob("*.py")
    for path in scripts:
        relative = [module for dots, module, _ in imports(path) if dots]
        assert not relative, f"{path} runs as a script or by path: import unipic_run... instead of .{relative}"
    for name, path in modules().items():
        if path not in scripts:
            absolute = [module for dots, module, _ in imports(path) if not dots and module.startswith("unipic_run")]
            assert not absolute, f"{name or '__init__'} is inside the package: import it relatively, not {absolute}"


def test_our_folders_are_never_imported_by_their_bare_names():
    for path in [*modules().values(), *(ROOT / "tests").rglob("*.py")]:
        bare = {module for dots, module, _ in imports(path) if not dots and module.split(".")[0] in TOP}
        assert not bare, f"{path} would load a second copy, or somebody else's package: {bare}"
