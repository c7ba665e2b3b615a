"""The order of the packages: imports go to lower numbers only, also those within functions, and without a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastvit

ROOT = Path(fastvit.__file__).parent
LAYERS = {
    "errors": -1, "arguments": 0, "files": 0, "kernels": 0,
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


def modules():
    """Name below fastvit -> file, without the packages that are links."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("kernels", "benchmarks") and parts not in (("__init__",), ("__main__",)):
            yield ".".join(parts).removesuffix(".__init__"), path


def imports_of(path, *, lazy):
    """Names below fastvit that a file imports: all, or those that importing it imports."""
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


@pytest.mark.parametrize("name", [name for name, _ in modules()])
def test_imports_go_to_lower_layers(name):
    own = name.split(".")[0]
    for imported in imports_of(dict(modules())[name], lazy=True):
        other = imported.split(".")[0]
        if other in LAYERS and other != own:
            assert LAYERS[other] < LAYERS[own], f"{name} imports {imported}"


def test_no_module_imports_itself_through_others():
    known = dict(modules())

    def resolve(imported):
        while imported and imported not in known:
            imported = imported.rpartition(".")[0]
        return imported

    graph = {
        name: {resolve(found) for found in imports_of(path, lazy=False)} - {name, ""} for name, path in known.items()
    }
    for name in [name for name in graph if "." in name]:  # importing a module imports its package
        graph[name].discard(name.rpartition(".")[0])
    list(TopologicalSorter(graph).static_order())


def test_kernels_import_nothing_of_fastvit():
    for path in (ROOT / "kernels").rglob("*.py"):
        for imported in imports_of(path, lazy=True):
            assert imported.startswith("kernels"), f"{path.name} imports fastvit.{imported}"


def test_no_file_is_longer_than_600_lines():
    root = ROOT.parent
    files = [path for folder in ("fastvit", "kernels", "benchmarks") for path in (root / folder).rglob("*.py")]
    lengths = {path.relative_to(root).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 600} == {}
