"""A hook of MkDocs: the notebooks of docs/learn become pages, with their outputs and with formulas as MathML.

MkDocs itself only copies notebooks, and a plugin for them needs all of Jupyter and loads scripts from other hosts.
"""

import base64
import json
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r"(\$\$?)(?! )([^$]+?)(?<! )\1")


def write_math(text: str) -> str:
    """LaTeX between dollar signs to MathML, except in code."""

    def replace(formula: re.Match) -> str:
        math = convert(formula[2], display="block" if formula[1] == "$$" else "inline").replace("_", "&#95;")
        # To Markdown, a line that begins with <math> is a block of HTML, which would end the paragraph.
        # A block that is wider than a phone scrolls.
        return f'<div style="overflow-x: auto">{math}</div>' if formula[1] == "$$" else f"<span>{math}</span>"

    parts = re.split(r"(```.*?```|`[^`\n]+`)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else FORMULA.sub(replace, part) for part in parts)


def convert_notebook(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and the PNG files that it shows by name."""
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(write_math(source) if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{notebook.stem}-{len(figures) + 1}.png"
                figures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure {len(figures)}]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f'<a href="../{notebook.name}" download>{notebook.name}</a>')
    return "\n\n".join(parts), figures


def on_files(files, config):
    for notebook in sorted((ROOT / "docs" / "learn").glob("*.ipynb")):
        text, figures = convert_notebook(notebook)
        files.append(File.generated(config, f"learn/{notebook.stem}.md", content=text))
        for name, png in figures.items():
            files.append(File.generated(config, f"learn/{name}", content=png))
    return files


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Links to a notebook lead to its page, at the end of which is the one that downloads it."""
    return re.sub(r"\]\((?P<path>(learn/)?[\w.-]+)\.ipynb\)", r"](\g<path>.md)", markdown)
