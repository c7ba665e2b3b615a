"""The structure of the source tree: import layers, and the sizes of packages, files and functions."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastvit

ROOT = Path(fastvit.__file__).parent
LAYERS = {
    "errors": -1, "files": 0, "kernels": 0,
    "ops": 1,
    "checkpoints": 2,
    "models": 3, "data": 3,
    "adapters": 4, "tuning": 4,
    "report": 5,
    "serve": 6,
    "train": 7,
    "finetune": 8, "benchmarks": 8,
    "cli": 9,
}  # fmt: skip
MAX_TOP_LEVEL_NAMES, MAX_FILE_LINES, MAX_FUNCTION_LINES = 12, 600, 75
LINKS_AND_SHIMS = {"benchmarks", "kernels", "finetune"}


def list_modules():
    """Yields (name below fastvit, file) of all modules except those of the linked packages and the package itself."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("kernels", "benchmarks") and parts not in (("__init__",), ("__main__",)):
            yield ".".join(parts).removesuffix(".__init__"), path


def list_files():
    """Yields (path below the repository's root, lines) of all source files."""
    for folder in ("fastvit", "kernels", "benchmarks"):
        for path in sorted((ROOT.parent / folder).rglob("*.py")):  # does not follow the links in fastvit
            yield path.relative_to(ROOT.parent).as_posix(), path.read_text(encoding="utf-8").splitlines()


def list_imports(path, *, lazy):
    """Yields the names below fastvit that a file imports. lazy: including imports inside of functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and (lazy or id(node) not in inner):
            for alias in node.names:
                name = f"{node.module}.{alias.name}".split(".")
                if name[0] == "fastvit" and len(name) > 1:
                    yield ".".join(name[1:])


@pytest.mark.parametrize("name", [name for name, _ in list_modules()])
def test_imports_go_to_lower_layers(name):
    own = name.split(".")[0]
    for imported in list_imports(dict(list_modules())[name], lazy=True):
        other = imported.split(".")[0]
        if other in LAYERS and other != own:
            assert LAYERS[other] < LAYERS[own], f"{name} imports {imported}"


def test_imports_have_no_cycles():
    known = dict(list_modules())

    def resolve(imported):
        while imported and imported not in known:
            imported = imported.rpartition(".")[0]
        return imported

    graph = {
        name: {resolve(found) for found in list_imports(path, lazy=False)} - {name, ""} for name, path in known.items()
    }
    for name in [name for name in graph if "." in name]:  # importing a module imports its package
        graph[name].discard(name.rpartition(".")[0])
    list(TopologicalSorter(graph).static_order())


def test_kernels_do_not_import_fastvit():
    for path in (ROOT / "kernels").rglob("*.py"):
        for imported in list_imports(path, lazy=True):
            assert imported.startswith("kernels"), f"{path.name} imports fastvit.{imported}"


def test_fastvit_has_at_most_a_dozen_top_level_names():
    names = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    names = {name for name in names if not name.startswith("_")} - LINKS_AND_SHIMS
    assert len(names) <= MAX_TOP_LEVEL_NAMES, sorted(names)


def test_no_file_is_too_long():
    assert {name: len(lines) for name, lines in list_files() if len(lines) > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    long = {}
    for name, lines in list_files():
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
                is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
                if count > MAX_FUNCTION_LINES and not is_kernel:
                    long[f"{name}: {node.name}"] = count
    assert long == {}
