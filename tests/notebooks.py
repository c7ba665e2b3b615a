"""Execute the notebooks of docs/learn, and save their outputs in place: make notebooks.

NAME.ko.ipynb is the Korean NAME.ipynb: its text is translated, its code cells and their outputs are copies. Only its
text is edited. Notebooks are run in an empty folder, as their readers' folders are not ours.
"""

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "docs" / "learn").glob("*.ipynb") if not path.name.endswith(".ko.ipynb"))
COLAB = "https://colab.research.google.com"


def execute(path: Path, folder: Path, **environment: str) -> nbformat.NotebookNode:
    """Run a notebook's cells in a new process with `folder` as its current folder, and return it with the outputs."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, **options, resources={"metadata": {"path": str(folder)}})
    return client.execute(env={**os.environ, "PYTHONPATH": python_path, **environment})


def read_repo_url() -> str:
    """The address of the repository in mkdocs.yml, or an empty string while it names none."""
    found = re.search(r"^repo_url: (\S+?)/?$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def get_colab_link(path: Path) -> str:
    """The address that opens a notebook in Colab: Colab's front page while there is no repository on GitHub."""
    owner_and_name = read_repo_url().partition("https://github.com/")[2]
    return f"{COLAB}/github/{owner_and_name}/blob/main/{path.relative_to(ROOT)}" if owner_and_name else COLAB


def copy_code(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Replace the code cells of the Korean notebook at `path`, and their outputs, by those of `notebook`."""
    korean = nbformat.read(path, as_version=4)
    text = [cell for cell in korean.cells if cell.cell_type == "markdown"]
    if len(text) != sum(cell.cell_type == "markdown" for cell in notebook.cells):
        sys.exit(f"{path.name}: expected as many text cells as the English notebook has, got {len(text)}")
    save(
        nbformat.from_dict(
            {
                **notebook,
                "cells": [
                    {**cell, "source": text.pop(0).source} if cell.cell_type == "markdown" else cell
                    for cell in notebook.cells
                ],
            }
        ),
        path,
    )


def shrink_png(encoded: str) -> str:
    """A figure in 256 colours: a third of the size."""
    file, figure = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(encoded)))
    if figure.mode == "P":  # done before
        return encoded
    figure.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook with the repository's addresses, and cell ids that a repeated run does not change."""
    title, install = notebook.cells[:2]
    title.source = re.sub(rf"{COLAB}[^)]*", get_colab_link(path), title.source)
    install.source = re.sub('REPOSITORY = ".*"', f'REPOSITORY = "{read_repo_url()}"', install.source)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = shrink_png(output["data"]["image/png"])
    nbformat.write(notebook, path)


def main() -> None:
    chosen = [path for path in NOTEBOOKS if not sys.argv[1:] or path.name.startswith(tuple(sys.argv[1:]))]
    for path in chosen:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        save(notebook, path)
        if (korean := path.with_suffix(".ko.ipynb")).exists():
            copy_code(notebook, korean)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
