"""Files of tensors, read without running code in them and without believing the sizes they claim, and written."""

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
    """The tensors of a folder, from the first of `WEIGHT_FILES` that it has."""
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
    """The files that an index of shards names; they stand beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: expected a weight_map of tensors to files, got {format_value(weight_map)}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: expected the names of files beside it, got {format_value(shard)}")
    return sorted(set(weight_map.values()))


def read_tensors(path: Path, *, plain: bool = True) -> dict[str, Tensor]:
    """A .safetensors or torch file; training scripts' wrappers around the state dict are taken off.

    The values are read from the file when they are used. plain: refuse tensors other than ordinary ones, which may
    claim any size at no cost: sparse ones, those without values, one value seen as a million.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Of torch's formats only the newer, a zip archive, can be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # its advice is to run the code
        raise InputError(f"{path}: expected tensors alone: damaged, or with objects that could run code") from error
    except Exception as error:  # no common class: a missing shard, a cut-off file, ...
        raise InputError(f"{path}: not a readable file of tensors alone: {format_error(error)}") from error
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
    """Whether it is an ordinary tensor on the CPU, with a place in memory for each of its values."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


# An .npz file may be compressed. Weights are noise, of which little can be saved: what grows more would fill memory.
MAX_EXPANSION = 50
UNCHECKED_EXPANSION = 2**26  # bytes: small files of equal numbers do no harm


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The parameters of an .npz file; where they stand below a prefix, what is outside is the optimiser's state."""
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        if expanded > max(UNCHECKED_EXPANSION, MAX_EXPANSION * path.stat().st_size):
            raise InputError(f"{path}: expected weights, found {path.stat().st_size:,} bytes that grow to {expanded:,}")
        with np.load(path, allow_pickle=False) as archive:
            prefixes = ("params/", "opt/target/")
            prefix = next((p for p in prefixes if any(name.startswith(p) for name in archive.files)), "")
            arrays = {name.removeprefix(prefix): archive[name] for name in archive.files if name.startswith(prefix)}
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile raise each their own
        raise InputError(f"{path}: not a readable .npz file of plain arrays: {format_error(error)}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
            found = getattr(array, "dtype", type(array).__name__)
            raise InputError(
                f"{path}: array {escape_unprintable(name)}: expected floating point weights, found {found}"
            )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Copies, because safetensors refuses tensors that share storage, as the parts of one fused tensor do.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors creates files that the owner alone can read, whatever the umask says
    save_file(copies, path, metadata={"format": "pt"})
    path.chmod(mode)
