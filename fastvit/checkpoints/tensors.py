"""Reads and writes files of tensors. No code in a file is run, and the sizes in its header are checked."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvit.checkpoints.configuration import format_error, format_value, read_json
from fastvit.errors import InputError, escape_unprintable

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TORCH_SUFFIXES = (".bin", ".pth", ".pt")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a folder, from the first of `WEIGHT_FILES` that exists."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: expected one of {', '.join(WEIGHT_FILES)}, found none")
    if path.suffix != ".json":
        return read_tensors(path)
    tensors: dict[str, Tensor] = {}
    for shard in read_shard_names(path):
        tensors.update(read_tensors(folder / shard))
    return tensors


def read_shard_names(index: Path) -> list[str]:
    """Reads the names of the shards from an index; raises InputError unless they are beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: expected a weight_map from tensors to files, got {format_value(weight_map)}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: expected the names of files beside it, got {format_value(shard)}")
    return sorted(set(weight_map.values()))


def read_tensors(path: Path, *, plain: bool = True) -> dict[str, Tensor]:
    """Reads a .safetensors or torch file, memory-mapped if possible, and unwraps a state dict of a training script.

    Args:
        path: The file.
        plain: Whether to refuse tensors whose shape may exceed the file: sparse, meta and expanded tensors.

    Returns:
        The tensors by name, without a "module." prefix.

    Raises:
        InputError: If the file cannot be read, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Of torch's two formats only the newer one, a zip archive, can be memory-mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code
        raise InputError(f"{path}: expected only tensors, found damage or objects that could run code") from error
    except Exception as error:  # no common class: a missing shard, a truncated file, ...
        raise InputError(f"{path}: not a readable file of tensors: {format_error(error)}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path}: expected a state dict of named tensors")
    named = {str(name).removeprefix("module."): tensor.detach() for name, tensor in tensors.items()}
    for name, tensor in named.items():
        if plain and not is_plain_tensor(tensor):
            raise InputError(
                f"{path}: tensor {escape_unprintable(name)}: expected values that the file holds, found a view"
            )
    return named


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a strided CPU tensor whose storage holds each of its values."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


# An .npz file may be compressed. Weights hardly compress, so a file that expands further is made to exhaust memory.
MAX_EXPANSION = 50
UNCHECKED_EXPANSION = 2**26  # bytes; small files of equal numbers are harmless


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Reads the parameters of an .npz file; if they have a prefix, arrays without it are the optimizer's state."""
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        if expanded > max(UNCHECKED_EXPANSION, MAX_EXPANSION * path.stat().st_size):
            size = path.stat().st_size
            raise InputError(f"{path}: expected weights, found {size:,} bytes that expand to {expanded:,}")
        with np.load(path, allow_pickle=False) as archive:
            prefixes = ("params/", "opt/target/")
            prefix = next((p for p in prefixes if any(name.startswith(p) for name in archive.files)), "")
            arrays = {name.removeprefix(prefix): archive[name] for name in archive.files if name.startswith(prefix)}
    except InputError:
        raise
    except Exception as error:  # NumPy and zipfile have no common class
        raise InputError(f"{path}: not a readable .npz file of plain arrays: {format_error(error)}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
            found = getattr(array, "dtype", type(array).__name__)
            raise InputError(
                f"{path}: array {escape_unprintable(name)}: expected floating point weights, found {found}"
            )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a .safetensors file with the permissions of the umask."""
    # safetensors refuses tensors that share storage, such as parts of one fused tensor.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors ignores the umask: only the owner could read the file
    save_file(copies, path, metadata={"format": "pt"})
    path.chmod(mode)
