"""Fetch the shared test classes of the installed transformers, and print the folder that contains them.

They are not in the wheel, but in the source distribution of the same version; they are cached in a folder that git
ignores. If the package registry cannot be reached, nothing is printed to stdout and the reason is printed to stderr.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".compat_cache"


def download(release: str, folder: Path) -> Path:
    """Download the source distribution of a release with pip, as configured on this machine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    done = subprocess.run([*command, "--dest", str(folder), f"transformers=={release}"], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed without a message")
    return next(folder.glob("transformers-*.tar.gz"))


def unpack(archive: Path, folder: Path) -> None:
    """Extract tests/*.py, and nothing else: the archive is not trusted."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and path.parts[1:2] == ("tests",) and len(path.parts) == 3 and path.suffix == ".py":
                source = tar.extractfile(member)
                assert source is not None
                (folder / "tests" / path.name).write_bytes(source.read())
    # Two of the files look for transformers' sources in the folders around them. Empty packages there make them use the
    # installed transformers instead.
    for package in ("tests", "src/transformers"):
        (folder / package / "__init__.py").touch()


def main() -> int:
    release = version("transformers")
    folder = CACHE / f"transformers-{release}"
    if not (folder / "complete").is_file():
        for name in ("tests", "src/transformers"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory() as downloads:
                unpack(download(release, Path(downloads)), folder)
        except (OSError, tarfile.TarError) as error:
            print(f"transformers {release}: cannot download its source distribution: {error}", file=sys.stderr)
            return 0
        (folder / "complete").touch()
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
