"""Reads and writes files of tensors. No code in a file is run, and the sizes in its header are checked."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvit.checkpoints.configuration import format_error, format_value, read_json
from fastvit.errors import InputError, escape_unprintable

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".pth.tar", ".pt.tar", ".ckpt")

# Where a training script keeps the weights in its checkpoint, in timm's order. The moving averages, if the script
# computed them, are the weights that it evaluated.
AVERAGES = ("state_dict_ema", "model_ema")
WRAPPERS = (*AVERAGES, "state_dict", "model")


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


def has_torch_suffix(path: Path) -> bool:
    return path.name.endswith(TORCH_SUFFIXES)


def read_tensors(path: Path, *, plain: bool = True, of_training: bool = False) -> dict[str, Tensor]:
    """Reads a .safetensors or torch file, memory-mapped if possible, and unwraps a state dict of a training script.

    Args:
        path: The file.
        plain: Whether to refuse tensors whose shape may exceed the file: sparse, meta and expanded tensors.
        of_training: Whether the file may be a checkpoint of a training script, with its options (`argparse.Namespace`)
            and with moving averages of the weights, which are then returned.

    Returns:
        The tensors by name, without the prefixes "module." and "_orig_mod." of wrapped and compiled models.

    Raises:
        InputError: If the file cannot be read, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return remove_wrapper_prefixes(load_file(path), path)
        # A Namespace is a record of values; unpickling one runs nothing. timm allows it, too.
        with torch.serialization.safe_globals([argparse.Namespace] if of_training else []):
            # Of torch's two formats only the newer one, a zip archive, can be memory-mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code
        raise InputError(describe_unsafe_file(path)) from error
    except Exception as error:  # no common class: a missing shard, a truncated file, ...
        raise InputError(f"{path}: not a readable file of tensors: {format_error(error)}") from error
    tensors = unwrap_state_dict(content, path, averages=of_training)
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path}: expected a state dict of named tensors{describe_content(tensors)}")
    named = remove_wrapper_prefixes({str(name): tensor.detach() for name, tensor in tensors.items()}, path)
    for name, tensor in named.items():
        if plain and not is_plain_tensor(tensor):
            raise InputError(
                f"{path}: tensor {escape_unprintable(name)}: expected values that the file holds, found a view"
            )
    return named


def unwrap_state_dict(content: Any, path: Path, averages: bool) -> Any:
    """Returns the state dict in a checkpoint of a training script: the moving averages if there are any."""
    while isinstance(content, Mapping):
        keys = [key for key in WRAPPERS if isinstance(content.get(key), Mapping) and (averages or key not in AVERAGES)]
        if not keys:
            break
        if keys[0] in AVERAGES and len(keys) > 1:
            warnings.warn(
                f"{path}: read {keys[0]}, the moving averages of the weights, as timm does, and not {keys[-1]}",
                stacklevel=2,
            )
        content = content[keys[0]]
    return content


def remove_wrapper_prefixes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Removes names of wrappers: torch.compile, DistributedDataParallel, AveragedModel, Lightning.

    Raises:
        InputError: If only some names begin with "module." or "model.", or two names become the same.
    """
    # torch.compile may wrap any module of a model, and nothing else adds this name.
    renamed = {name: re.sub(r"(^|(?<=\.))_orig_mod\.", "", name) for name in tensors}
    renamed.pop("n_averaged", None)  # the count of updates in torch.optim.swa_utils.AveragedModel
    for prefix in ("module.", "model.", "module."):
        prefixed = [name for name in renamed.values() if name.startswith(prefix)]
        if prefixed and len(prefixed) < len(renamed):
            other = next(name for name in renamed.values() if not name.startswith(prefix))
            raise InputError(
                f"{path}: {len(prefixed)} of {len(renamed)} names begin with {prefix!r}, such as"
                f" {escape_unprintable(prefixed[0])}, others do not, such as {escape_unprintable(other)}: expected the"
                " weights of one model"
            )
        if prefixed:
            renamed = {name: short.removeprefix(prefix) for name, short in renamed.items()}
    if len(set(renamed.values())) < len(renamed):
        raise InputError(
            f"{path}: two tensors have the same name without '_orig_mod.': expected the weights of one model"
        )
    return {short: tensors[name] for name, short in renamed.items()}


def describe_unsafe_file(path: Path) -> str:
    """Describes a file that torch.load refuses, and how to extract its weights."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # reads the file without running it
    except Exception:  # not a zip archive, or damaged
        found = []
    named = f" ({escape_unprintable(', '.join(sorted(found)[:5]))})" if found else ""
    return (
        f"{path}: expected only tensors, found damage or objects that could run code{named}. If you trust the file,"
        f" save its weights alone: checkpoint = torch.load({escape_unprintable(path.name)!r}, weights_only=False); then"
        " torch.save(checkpoint['state_dict'], 'weights.pth'), where 'state_dict' is the key of the weights"
    )


def describe_content(content: Any) -> str:
    """Describes what a file holds instead of tensors, for an error message."""
    if not isinstance(content, Mapping):
        return f", got {type(content).__name__}"
    inner = [
        str(key)
        for key, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())
    ]
    if not inner:
        return f", found {format_value(list(content))}"
    return (
        f", found tensors under {format_value(inner)}: save those of the model alone, such as"
        f" torch.save(torch.load(...)[{inner[0]!r}], 'weights.pth')"
    )


def read_recorded_heads(path: Path) -> int | None:
    """Reads the number of heads that `fastvit convert` records in the header of a timm .safetensors file."""
    with safe_open(path, "pt") as file:
        recorded = (file.metadata() or {}).get("num_heads", "")
    return int(recorded) if re.fullmatch(r"[1-9]\d{0,4}", recorded, re.ASCII) else None


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


def save_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Writes a .safetensors file with the permissions of the umask, and `metadata` in its header."""
    # safetensors refuses tensors that share storage, such as parts of one fused tensor.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors ignores the umask: only the owner could read the file
    save_file(copies, path, metadata={"format": "pt", **metadata})
    path.chmod(mode)
