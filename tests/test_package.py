"""Installation and import of the package, and its command."""

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import fastvit
from fastvit import cli

ROOT = Path(__file__).parent.parent


def run(code: str, cwd: Path, *path: Path) -> str:
    """The output of a new interpreter in `cwd`, with `path` before the installed packages."""
    program = f"import sys; sys.path[:0] = {[str(entry) for entry in path]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("installed", [False, True])
def test_kernels_folder_does_not_break_the_import_of_transformers(installed, tmp_path):
    """In the root of the repository, with and without an installed package named `kernels`."""
    if installed:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text("__version__ = '0.0.1'\nname = 'the real package'\n")
    code = (
        "from transformers import ViTForImageClassification, ViTConfig\n"
        "config = ViTConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, image_size=16)\n"
        "ViTForImageClassification(config)\n"
        "import kernels; print(getattr(kernels, 'name', 'a bare folder'))\n"
    )
    # The current folder is first, as for `python -c` and `python -m`; the installed package is after it.
    program = f"import sys; sys.path[:0] = ['']; sys.path.append({str(tmp_path)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("the real package" if installed else "a bare folder")


@pytest.mark.parametrize("from_root", [False, True])
def test_package_can_be_imported_from_its_source_tree(from_root, tmp_path):
    code = "import fastvit, fastvit.models.vit; print(fastvit.__file__)"
    printed = run(code, ROOT if from_root else tmp_path, ROOT)
    assert Path(printed.strip()) == ROOT / "fastvit" / "__init__.py"


def test_version_equals_the_installed_version():
    try:
        installed = distribution("fastvit").version
    except ModuleNotFoundError:
        pytest.skip("fastvit is not installed")
    assert installed == fastvit.__version__


def test_public_names_can_all_be_imported():
    for name in fastvit.__all__:
        assert getattr(fastvit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ViTForSegmentation'"):
        fastvit.ViTForSegmentation  # noqa: B018


def test_command_without_arguments_lists_the_subcommands(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fastvit.__version__


def test_unknown_subcommand_is_an_error(capsys):
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == (f"error: expected one of {', '.join(cli.COMMANDS)}, got 'train'\n")


def test_convert_names_a_missing_source(tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "nothing.npz"), str(tmp_path / "out")]) == 2
    assert "nothing.npz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
