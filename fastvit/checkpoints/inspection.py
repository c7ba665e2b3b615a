"""A look at a checkpoint before it is loaded: its config.json, and whether its weights are the ones described there.

Of the weights only names, shapes and types are read, from the headers of the files, so that a config.json of absurd
sizes, or a file that claims more than it holds, is refused before memory is taken. No code in a file is ever run.
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
from fastvit.checkpoints.names import list_parameters
from fastvit.checkpoints.tensors import read_shard_names, read_tensors
from fastvit.errors import InputError

# A quantised checkpoint packs at most this many weights into an element of a tensor (4-bit types).
MAX_PACKED_WEIGHTS = 2


class Header(NamedTuple):
    """What is known of a tensor without its values; dtype as in its file."""

    shape: tuple[int, ...]
    dtype: str
    is_floating: bool


def read_config(model: str | Path, **hub: Any) -> dict[str, Any]:
    """The content of a checkpoint's config.json, as transformers finds it in a folder or on the hub.

    hub: where on the hub, as `from_pretrained` takes it. Raises InputError for a file that is no JSON object, and what
    transformers raises where there is none.
    """
    path = Path(model, hub.get("subfolder") or "", "config.json")
    if path.is_file():
        read_json(path)
    try:
        stored, _ = ViTConfig.get_config_dict(model, **hub)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{model}: config.json cannot be read: {format_error(error)}") from error
    return stored


def check_checkpoint(
    model: str | Path,
    stored: Mapping[str, Any],
    key_mapping: Mapping[str, str],
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    **hub: Any,
) -> None:
    """Check a config.json on its own, then against the headers of the weights beside it.

    stored: what `read_config` returned. key_mapping: patterns of names that stand for ours, and what they are replaced
    by. The other arguments are those of `from_pretrained`. Raises InputError, naming the file. Whether there are
    weights at all is left to transformers to say.
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
    """The files that transformers takes a checkpoint's weights from, all of its shards; none where there are none."""
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
    """The ending of a file of a variant: "fp16.safetensors", "safetensors.index.fp16.json"."""
    before, dot, last = suffix.rpartition(".")
    return f"{before}{dot}{variant}.{last}"


def find_file(model: str | Path, name: str, hub: Mapping[str, Any]) -> Path | None:
    found = cached_file(
        str(model),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{option: value for option, value in hub.items() if option != "force_download"},  # once is enough
    )
    return None if found is None else Path(found)


def read_headers(path: Path, *, plain: bool = True) -> dict[str, Header]:
    """Names, shapes and types of the tensors in a .safetensors or torch file; plain: as in `read_tensors`."""
    if path.suffix != ".safetensors":
        tensors = read_tensors(path, plain=plain)
        return {
            name: Header(tuple(tensor.shape), str(tensor.dtype), tensor.is_floating_point())
            for name, tensor in tensors.items()
        }
    try:
        # It checks the header against the length of the file: every byte belongs to one tensor of the right size.
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            return {
                name: Header(tuple(part.get_shape()), dtypes[name], dtypes[name].startswith(("F", "BF")))
                for name, part in slices.items()
            }
    except Exception as error:  # safetensors' own error, the system's, those of memory mapping
        raise InputError(f"{path}: not a readable file of tensors: {format_error(error)}") from error


def check_headers(
    headers: Mapping[str, Header],
    config: ViTConfig,
    key_mapping: Mapping[str, str],
    where: str,
    is_quantized: bool = False,
) -> None:
    """Whether the backbone that `config` describes is the one that the weights hold.

    Heads may differ from the config. Names that are not ours are left for the loading itself to report.
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
    # Whatever the names are: a model is not made that is larger than its weights.
    held = sum(math.prod(header.shape) for header in headers.values())
    if described > MAX_PACKED_WEIGHTS * held:
        raise InputError(f"{where}: config.json describes a model of {described:,} weights, its files hold {held:,}")


def translate_name(name: str, key_mapping: Mapping[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        name = re.sub(pattern, replacement, name)
    return name.removeprefix("vit.")


def check_shapes(headers: Mapping[str, Header], shapes: Mapping[str, Sequence[int]], where: str | Path) -> None:
    """Whether the tensors of a file that a model knows, `shapes` by name, have the shapes that it has."""
    for name, header in headers.items():
        if name in shapes and header.shape != tuple(shapes[name]):
            raise InputError(f"{where}: {name}: expected shape {list(shapes[name])}, found {list(header.shape)}")


# What the .metadata file of a sharded checkpoint consists of, by module; and types of torch by name.
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
    """Unpickles the .metadata file of a sharded checkpoint, and no class that such a file has no use for."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and name not in SHARD_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place here")
        return super().find_class(module, name)


def check_shard_metadata(folder: Path) -> None:
    """Read the .metadata files below a run's folder before torch.distributed does, which would run any code in them."""
    for path in sorted(folder.rglob("*.metadata")):
        try:
            with path.open("rb") as file:
                ShardUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises anything
            raise InputError(f"{path}: expected parts of a sharded checkpoint alone: {format_error(error)}") from error
