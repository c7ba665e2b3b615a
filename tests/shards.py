"""Drawn leaves as WebDataset shards: tar files with NAME.png and NAME.cls side by side."""

import io
import tarfile
from pathlib import Path

from fastvit.data import leaves


def write_shard(path: Path, samples: list[tuple[str, bytes, bytes]], extension: str = "cls") -> None:
    """Writes `samples`: name, encoded image and encoded label of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, image, label in samples:
            for suffix, data in (("png", image), (extension, label)):
                entry = tarfile.TarInfo(f"{name}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def encode_leaf(label: int, seed: int, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    leaves.draw_leaf(leaves.CLASSES[label], seed=seed, size=size).save(buffer, "PNG")
    return buffer.getvalue()


def make_shards(root: Path, shards: int = 2, per_shard: int = 12, validation: int = 9) -> Path:
    """Writes train-N.tar, and validation-0.tar unless `validation` is 0; .cls holds the number of the class."""
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        samples = [(f"{number:04}", encode_leaf(number % 3, number), str(number % 3).encode()) for number in numbers]
        write_shard(root / f"train-{shard}.tar", samples)
    if validation:
        samples = [(f"v{n:04}", encode_leaf(n % 3, 1000 + n), str(n % 3).encode()) for n in range(validation)]
        write_shard(root / "validation-0.tar", samples)
    return root
