"""Mutation testing of `test_bounds.py`: remove one mask from one kernel, and check that a test fails.

    python tests/mutate_masks.py [--sample 12] [--only layer_norm.py:96] [--jobs 2]

Each mutation is tested in its own process, in a copy of the source tree. A mutation removes the mask of a `tl.load` or
`tl.store`, the `other` of a load, or one operand of a mask `a & b`. Prints each mutation and its outcome. The exit code
is 1 if a mutation survived that is not in EQUIVALENT. Surviving removals of `other` do not count: the tests replace it
by NaN, so a surviving one proves that no result depends on it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ |= {
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}  # before Triton's import

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
COPIED_PATHS = ("fastvit", "kernels", "benchmarks", "tests", "pyproject.toml")

# Mutations without an observable effect, and the reason: keyed by file, function and the removed text.
EQUIVALENT: dict[tuple[str, str, str], str] = {}


class Mutation(NamedTuple):
    path: Path
    line: int
    function: str
    text: str  # the removed part
    source: str  # the file after the removal

    @property
    def is_harmless(self) -> bool:
        """Whether it may survive: it changes the value of masked lanes, but no access."""
        return self.text.startswith("other of ")

    def __str__(self) -> str:
        return f"{self.path.relative_to(KERNELS)}:{self.line} {self.function}: without {self.text}"

    @property
    def key(self) -> tuple[str, str, str]:
        return str(self.path.relative_to(KERNELS)), self.function, self.text


def find_mutations(path: Path) -> Iterator[Mutation]:
    source = path.read_text()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and any(
            "triton.jit" in ast.unparse(d) for d in function.decorator_list
        ):
            for node in ast.walk(function):
                for text, replaced in _remove_parts(node):
                    yield Mutation(path, node.lineno, function.name, text, _replace(source, node, replaced))


def _remove_parts(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield each removable part of this expression, and the expression without it."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        left, right = ast.unparse(node.left), ast.unparse(node.right)
        if not isinstance(node.right, ast.Constant):  # a constant is a bit mask
            yield f"{left} of {left} & {right}", right
            yield f"{right} of {left} & {right}", left
    if not isinstance(node, ast.Call):
        return
    name = ast.unparse(node.func)
    pointers = {"tl.load": 1, "tl.store": 2}.get(name)  # arguments before the mask
    if pointers is None:
        return
    named = {keyword.arg: keyword for keyword in node.keywords}
    mask = node.args[pointers] if len(node.args) > pointers else named["mask"].value if "mask" in named else None
    if mask is None or (isinstance(mask, ast.Constant) and mask.value is None):
        return
    rest = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
    bare = ast.Call(node.func, node.args[:pointers], rest)
    yield f"the mask {ast.unparse(mask)} of {ast.unparse(bare)}", ast.unparse(bare)
    if "other" in named or (len(node.args) > 2 and name == "tl.load"):
        masked = ast.Call(node.func, [*node.args[:pointers], mask], rest)
        yield f"other of {ast.unparse(masked)}", ast.unparse(masked)


def _replace(source: str, node: ast.expr, text: str) -> str:
    lines = source.encode().splitlines(keepends=True)  # the offsets of nodes count bytes
    begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    whole = b"".join(lines)
    return (whole[:begin] + f"({text})".encode() + whole[end:]).decode()


def find_all_mutations() -> list[Mutation]:
    return [mutation for path in sorted(KERNELS.rglob("*.py")) for mutation in find_mutations(path)]


def sample_mutations(mutations: list[Mutation], size: int) -> list[Mutation]:
    """Return `size` mutations, spread evenly over the files. The sample is the same for the same source."""
    chosen = random.Random(0)
    by_file: dict[Path, list[Mutation]] = {}
    for mutation in mutations:
        by_file.setdefault(mutation.path, []).append(mutation)
    piles = [chosen.sample(pile, len(pile)) for pile in by_file.values()]
    turns = [pile[turn] for turn in range(max(map(len, piles))) for pile in piles if turn < len(pile)]
    return turns[:size]


def survives(mutation: Mutation) -> tuple[bool, str]:
    """Return whether the bounds tests pass with this mutation, and otherwise the line of the error.

    Changes the working directory and imports the mutated copy, so it needs a fresh process.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED_PATHS:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copy / name)
        (copy / mutation.path.relative_to(ROOT)).write_text(mutation.source)
        os.chdir(copy)
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "tests"))]
        sys.path.append(str(copy / "tests"))
        importlib.import_module("bounds").ORDERS = ("usual",)  # an invalid access shows in any order
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-k", select_cases(mutation.path)]
            code = pytest.main([*options, "tests/test_bounds.py"])
    text = output.getvalue()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"{mutation}: {text[-2000:]}")
    reasons = [line for line in text.splitlines() if re.search(r"\w(Error|Exception)\b", line)]
    return code == pytest.ExitCode.OK, reasons[0].strip()[-160:] if reasons else ""


def select_cases(path: Path) -> str:
    """Return the `-k` expression that selects the cases of test_bounds.py which run the kernels of this file."""
    first = path.relative_to(KERNELS).with_suffix("").parts[0]
    users = {"layer_norm": "layer_norm or quantize or linear", "gelu": "gelu or linear or quantize"}
    return users.get(first, {"layer_norm_gelu": "linear", "layer_norm_linear": "linear"}.get(first, first))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="number of mutations, spread over the files (default: all)")
    parser.add_argument(
        "--only", default="", help="only mutations whose description contains this text, such as 'linear.py:96'"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--list", action="store_true", help="list the mutations without running tests")
    options = parser.parse_args()
    mutations = [mutation for mutation in find_all_mutations() if options.only in str(mutation)]
    if options.sample:
        mutations = sample_mutations(mutations, options.sample)
    if options.list:
        print(*mutations, sep="\n")
        return 0
    survivors = 0
    context = multiprocessing.get_context("forkserver")  # each process starts with PyTorch and Triton imported
    context.set_forkserver_preload(["torch", "triton.runtime.interpreter", "transformers", "pytest"])
    with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for mutation, (survived, error) in zip(mutations, pool.map(survives, mutations), strict=True):
            reason = "the masked lanes are not used" if mutation.is_harmless else EQUIVALENT.get(mutation.key)
            survivors += survived and reason is None
            fate = f"killed    {error}" if not survived else f"equivalent  {reason}" if reason else "SURVIVED"
            print(f"{mutation}\n    {fate}", flush=True)
    print(f"{len(mutations)} mutations, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
