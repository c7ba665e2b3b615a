"""Validation of a checkpoint before it is loaded: its config.json, and whether its weights match the config.

Only names, shapes and dtypes of the weights are read, from the headers of the files. A config.json with absurd sizes,
or a file whose header declares more than the file holds, is refused before memory is allocated. No code is run.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import ViTConfig
from transformers.utils import cached_file

from fastvit.checkpoints.checkpoint import compute_sizes
from fastvit.checkpoints.configuration import format_error, parse_config, read_json
from fastvit.checkpoints.locations import check_location
from fastvit.checkpoints.names import list_parameters
from fastvit.checkpoints.tensors import read_shard_names, read_tensors
from fastvit.errors import InputError

# A quantised checkpoint packs at most this many weights into one element of a tensor (4-bit types).
MAX_PACKED_WEIGHTS = 2


class Header(NamedTuple):
    """Shape and dtype of a tensor, without its values. `dtype` is spelled as in the file."""

    shape: tuple[int, ...]
    dtype: str
    is_floating: bool


def read_config(model: str | Path, **hub: Any) -> dict[str, Any]:
    """Reads the config.json of a checkpoint in a folder or on the hub.

    Args:
        model: A folder or hub id.
        **hub: Options of `from_pretrained` that select the file on the hub.

    Returns:
        The content of config.json, not validated.

    Raises:
        InputError: If there is no such folder, or the file is not a JSON object.
        OSError: If there is no config.json, from transformers.
    """
    if not hub.get("subfolder"):
        check_location(model)
    path = Path(model, hub.get("subfolder") or "", "config.json")
    if path.is_file():
        read_json(path)
    elif path.parent.is_dir():
        check_is_finished(path.parent)
    try:
        stored, _ = ViTConfig.get_config_dict(model, **hub)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{model}: config.json cannot be read: {format_error(error)}") from error
    return stored


def check_is_finished(folder: Path) -> None:
    """Checks that a folder without config.json is not that of an unfinished run, or of one with folds.

    Raises:
        InputError: If it is, with the folder to use instead.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    folds = sorted(folder.glob("fold-*/config.json"))
    if folds:
        raise InputError(
            f"{folder}: expected a model, found the folder of {len(folds)} folds; use one of them, such as"
            f" {folds[0].parent}"
        )
    if not checkpoints and not (folder / "config.yaml").is_file():
        return
    last = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    advice = "finish it with `fastvit finetune` and --resume"
    if last is not None and (last / "config.json").is_file() and (last / "model.safetensors").is_file():
        advice = f"use {last}, its last checkpoint, or {advice}"
    raise InputError(f"{folder}: expected a finished run, found one without a model; {advice}")


def check_checkpoint(
    model: str | Path,
    stored: Mapping[str, Any],
    key_mapping: Mapping[str, str],
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    **hub: Any,
) -> None:
    """Validates a config.json, then compares it with the headers of the weights.

    A checkpoint without weights passes; transformers reports it when it loads them.

    Args:
        model: A folder or hub id.
        stored: The result of `read_config`.
        key_mapping: Patterns of names in the files -> replacements that turn them into names of this package.
        use_safetensors: As in `from_pretrained`.
        variant: As in `from_pretrained`.
        **hub: Other options of `from_pretrained` that select files on the hub.

    Raises:
        InputError: If the config is not valid, or the weights cannot be read or do not match it.
    """
    config = parse_config(stored, f"{model}: config.json")
    headers: dict[str, Header] = {}
    for path in find_weight_files(model, use_safetensors, variant, hub):
        headers.update(read_headers(path, plain=stored.get("quantization_config") is None))
    if headers:
        is_quantized = stored.get("quantization_config") is not None
        check_headers(headers, config, key_mapping, str(model), is_quantized)


def find_weight_files(
    model: str | Path, use_safetensors: bool | None, variant: str | None, hub: Mapping[str, Any]
) -> list[Path]:
    """Returns the files that transformers would load the weights from, with all shards; empty if there are none."""
    names = []
    if use_safetensors is not False:
        names += ["model.safetensors", "model.safetensors.index.json"]
    if not use_safetensors:
        names += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in names:
        stem, suffix = name.split(".", 1)
        path = find_file(model, name if variant is None else f"{stem}.{insert_variant(suffix, variant)}", hub)
        if path is None:
            continue
        if path.suffix != ".json":
            return [path]
        shards = [find_file(model, shard, hub) for shard in read_shard_names(path)]
        return [shard for shard in shards if shard is not None]
    return []


def insert_variant(suffix: str, variant: str) -> str:
    """Inserts a variant into a suffix: "fp16.safetensors", "safetensors.index.fp16.json"."""
    before, dot, last = suffix.rpartition(".")
    return f"{before}{dot}{variant}.{last}"


def find_file(model: str | Path, name: str, hub: Mapping[str, Any]) -> Path | None:
    """Returns the local path of a checkpoint's file, downloaded if necessary; None if there is no such file."""
    found = cached_file(
        str(model),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{option: value for option, value in hub.items() if option != "force_download"},  # loading downloads again
    )
    return None if found is None else Path(found)


def read_headers(path: Path, *, plain: bool = True) -> dict[str, Header]:
    """Reads names, shapes and dtypes of the tensors in a .safetensors or torch file; `plain` as in `read_tensors`."""
    if path.suffix != ".safetensors":
        tensors = read_tensors(path, plain=plain)
        return {
            name: Header(tuple(tensor.shape), str(tensor.dtype), tensor.is_floating_point())
            for name, tensor in tensors.items()
        }
    try:
        # safe_open checks the header: every byte of the file belongs to exactly one tensor of the right size.
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            return {
                name: Header(tuple(part.get_shape()), dtypes[name], dtypes[name].startswith(("F", "BF")))
                for name, part in slices.items()
            }
    except Exception as error:  # SafetensorError, OSError and errors of memory mapping
        raise InputError(f"{path}: not a readable file of tensors: {format_error(error)}") from error


def check_headers(
    headers: Mapping[str, Header],
    config: ViTConfig,
    key_mapping: Mapping[str, str],
    where: str,
    is_quantized: bool = False,
) -> None:
    """Raises InputError if the weights do not hold the backbone that `config` describes.

    Heads may differ from the config. Unknown names are reported later, when the weights are loaded.
    """
    tensors = {translate_name(name, key_mapping): header for name, header in headers.items()}
    layers = {match[1] for name in tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    if layers and len(layers) < config.num_hidden_layers:
        raise InputError(
            f"{where}: config.json: num_hidden_layers: expected {len(layers)}, as its weights have,"
            f" got {config.num_hidden_layers}"
        )
    sizes = {"1": 1, **compute_sizes(config)}
    described = 0
    for row in list_parameters(
        config.num_hidden_layers, qkv_bias=config.qkv_bias, pooler=False, classifier=False, prefix=""
    ):
        expected = tuple(sizes[symbol] for symbol in row.shape.split())
        described += math.prod(expected)
        header = tensors.get(row.hf)
        if header is None or (is_quantized and not header.is_floating):
            continue
        if header.shape != expected:
            raise InputError(
                f"{where}: {row.hf}: expected shape {list(expected)}, as config.json describes it,"
                f" found {list(header.shape)}"
            )
        if not header.is_floating:
            raise InputError(f"{where}: {row.hf}: expected floating point weights, found {header.dtype}")
    # With unknown names, too, no model is built that is larger than its weights.
    held = sum(math.prod(header.shape) for header in headers.values())
    if described > MAX_PACKED_WEIGHTS * held:
        raise InputError(f"{where}: config.json describes a model of {described:,} weights, its files hold {held:,}")


def translate_name(name: str, key_mapping: Mapping[str, str]) -> str:
    """Applies the replacements of `key_mapping` to a name and removes the prefix of the backbone."""
    for pattern, replacement in key_mapping.items():
        name = re.sub(pattern, replacement, name)
    return name.removeprefix("vit.")


def check_shapes(headers: Mapping[str, Header], shapes: Mapping[str, Sequence[int]], where: str | Path) -> None:
    """Raises InputError if a tensor in a file and the parameter of the same name differ in shape."""
    for name, header in headers.items():
        if name in shapes and header.shape != tuple(shapes[name]):
            raise InputError(f"{where}: {name}: expected shape {list(shapes[name])}, found {list(header.shape)}")


# Classes that the .metadata file of a sharded checkpoint may refer to, by module. torch dtypes are allowed as well.
SHARD_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class ShardUnpickler(pickle.Unpickler):
    """Unpickles the .metadata file of a sharded checkpoint; refuses every class that is not in `SHARD_CLASSES`."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and name not in SHARD_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def check_shard_metadata(folder: Path) -> None:
    """Raises InputError if a .metadata file below `folder` refers to code, which torch.distributed would run."""
    for path in sorted(folder.rglob("*.metadata")):
        try:
            with path.open("rb") as file:
                ShardUnpickler(file).load()
        except Exception as error:  # a damaged pickle may raise any error
            raise InputError(f"{path}: expected only parts of a sharded checkpoint: {format_error(error)}") from error
