"""The notebooks of docs/learn: each runs; their committed outputs are complete and small; both languages agree."""

import re

import nbformat
import notebooks
import pytest

PATHS = sorted((notebooks.ROOT / "docs" / "learn").glob("*.ipynb"))
KOREAN = [path for path in PATHS if path.name.endswith(".ko.ipynb")]
NAMES = {"ids": lambda path: path.name}


def list_code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# What torchao and bitsandbytes print when they are imported beside a CPU build of PyTorch; the tests install them.
IMPORTS = re.compile(r"Failed to load .*|W\d+ .* is an Enum subclass and is now natively supported .*")


def check_outputs(notebook) -> None:
    """No warning, no traceback, nothing that only this machine has."""
    outputs = [output for cell in list_code(notebook) for output in cell.outputs]
    errors = [output.get("text", "") for output in outputs if output.get("name") == "stderr"]
    assert not [line for text in errors for line in text.splitlines() if not IMPORTS.fullmatch(line)]
    assert not [output for output in outputs if output.output_type == "error"]
    outputs = [output for output in outputs if output.get("name") != "stderr"]
    for output in outputs:
        texts = [output.get("text", ""), *(value for kind, value in output.get("data", {}).items() if "text" in kind)]
        assert not re.search(r"Warning\b|/(home|root|work|tmp|Users)/", "".join(texts)), texts


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, **NAMES)
def test_notebook_runs(path, tmp_path):
    """FASTVIT_NOTEBOOK_QUICK=1: fewer images and steps, in the cells where the notebook itself says so."""
    caches = {"FASTVIT_CACHE_DIR": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    notebook = notebooks.execute(path, tmp_path, FASTVIT_NOTEBOOK_QUICK="1", **caches)
    check_outputs(notebook)


@pytest.mark.parametrize("path", PATHS, **NAMES)
def test_committed_notebook_has_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = list_code(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_outputs(notebook)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert path.stat().st_size < 1_000_000
    assert notebooks.get_colab_link(path) in notebook.cells[0].source


@pytest.mark.parametrize("path", KOREAN, **NAMES)
def test_korean_notebook_has_the_code_of_the_english_one(path):
    english, korean = (
        nbformat.read(name, as_version=4) for name in (path.with_name(path.name.replace(".ko.", ".")), path)
    )
    assert [cell.cell_type for cell in korean.cells] == [cell.cell_type for cell in english.cells]
    for ours, theirs in zip(korean.cells, english.cells, strict=True):
        if ours.cell_type == "code":
            assert (ours.source, ours.outputs) == (theirs.source, theirs.outputs)
        else:
            assert re.search("[가-힣]", ours.source) and ours.source != theirs.source
