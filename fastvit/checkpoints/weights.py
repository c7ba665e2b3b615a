"""Vision Transformer checkpoints in three formats, and the way between them.

    hf    a Hugging Face folder: config.json (model_type "vit"), weights, preprocessor_config.json
    timm  a VisionTransformer of the timm library: a file of tensors, or a folder as on the hub
    npz   the JAX files of the paper's authors (github.com/google-research/vision_transformer)

`PARAMETERS` below is the whole map: one row for each parameter, with its name in each format. Everything is read into
hub names and written from them, and every tensor is accounted for: one that is missing, left over or of the wrong shape
stops the conversion.

Shapes: D hidden size, F feed-forward size, H heads of K features, C channels, h x w pixels a patch, N tokens (class
token and patches), L labels, O pooler size.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig

from fastvit.checkpoints.configuration import (
    SIZE_LIMITS,
    as_pair,
    check_channels,
    check_size,
    checked_config,
    is_real,
    is_whole,
    read_json,
    shown,
    shown_error,
)
from fastvit.errors import InputError, printable

Format = Literal["hf", "timm", "npz"]
Sizes = dict[str, int]
ImageSettings = tuple[tuple[float, ...], tuple[float, ...], tuple[int, int], int]  # mean, std, size, filter


class Parameter(NamedTuple):
    """One parameter's name in each format, with `{}` for the layer, and its shape in PyTorch and in JAX.

    Rows that share a timm name are stored there as one tensor, one below the other along the first dimension.
    """

    hf: str
    timm: str
    npz: str
    shape: str
    npz_shape: str


def block_parameter(hf: str, timm: str, npz: str, shape: str, npz_shape: str) -> Parameter:
    return Parameter(
        "encoder.layer.{}." + hf, "blocks.{}." + timm, "Transformer/encoderblock_{}/" + npz, shape, npz_shape
    )


ATTENTION = "MultiHeadDotProductAttention_1/"

# fmt: off
EMBEDDINGS = (
    Parameter("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight",
              "embedding/kernel", "D C h w", "h w C D"),
    Parameter("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias", "embedding/bias", "D", "D"),
    Parameter("embeddings.cls_token", "cls_token", "cls", "1 1 D", "1 1 D"),
    Parameter("embeddings.position_embeddings", "pos_embed",
              "Transformer/posembed_input/pos_embedding", "1 N D", "1 N D"),
)
BLOCK = (
    block_parameter("layernorm_before.weight", "norm1.weight", "LayerNorm_0/scale", "D", "D"),
    block_parameter("layernorm_before.bias", "norm1.bias", "LayerNorm_0/bias", "D", "D"),
    block_parameter("attention.attention.query.weight", "attn.qkv.weight", ATTENTION + "query/kernel", "D D", "D H K"),
    block_parameter("attention.attention.key.weight", "attn.qkv.weight", ATTENTION + "key/kernel", "D D", "D H K"),
    block_parameter("attention.attention.value.weight", "attn.qkv.weight", ATTENTION + "value/kernel", "D D", "D H K"),
    block_parameter("attention.output.dense.weight", "attn.proj.weight", ATTENTION + "out/kernel", "D D", "H K D"),
    block_parameter("attention.output.dense.bias", "attn.proj.bias", ATTENTION + "out/bias", "D", "D"),
    block_parameter("layernorm_after.weight", "norm2.weight", "LayerNorm_2/scale", "D", "D"),
    block_parameter("layernorm_after.bias", "norm2.bias", "LayerNorm_2/bias", "D", "D"),
    block_parameter("intermediate.dense.weight", "mlp.fc1.weight", "MlpBlock_3/Dense_0/kernel", "F D", "D F"),
    block_parameter("intermediate.dense.bias", "mlp.fc1.bias", "MlpBlock_3/Dense_0/bias", "F", "F"),
    block_parameter("output.dense.weight", "mlp.fc2.weight", "MlpBlock_3/Dense_1/kernel", "D F", "F D"),
    block_parameter("output.dense.bias", "mlp.fc2.bias", "MlpBlock_3/Dense_1/bias", "D", "D"),
)
QKV_BIAS = (
    block_parameter("attention.attention.query.bias", "attn.qkv.bias", ATTENTION + "query/bias", "D", "H K"),
    block_parameter("attention.attention.key.bias", "attn.qkv.bias", ATTENTION + "key/bias", "D", "H K"),
    block_parameter("attention.attention.value.bias", "attn.qkv.bias", ATTENTION + "value/bias", "D", "H K"),
)
FINAL_NORM = (
    Parameter("layernorm.weight", "norm.weight", "Transformer/encoder_norm/scale", "D", "D"),
    Parameter("layernorm.bias", "norm.bias", "Transformer/encoder_norm/bias", "D", "D"),
)
POOLER = (
    Parameter("pooler.dense.weight", "pre_logits.fc.weight", "pre_logits/kernel", "O D", "D O"),
    Parameter("pooler.dense.bias", "pre_logits.fc.bias", "pre_logits/bias", "O", "O"),
)
CLASSIFIER = (
    Parameter("classifier.weight", "head.weight", "head/kernel", "L D", "D L"),
    Parameter("classifier.bias", "head.bias", "head/bias", "L", "L"),
)
# fmt: on

# JAX keeps a kernel as [in, out] and a convolution as [h, w, in, out]: the order of PyTorch's dimensions in JAX,
# by their number.
JAX_ORDER = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (2, 3, 1, 0)}

# What the timm and npz formats do not write down, because the code that reads them has it built in. flax's LayerNorm
# and timm's Vision Transformers use 1e-6; the 1e-12 of Google's own configs on the hub is ViTConfig's default, taken
# from BERT, and not what the weights were trained with. flax's gelu is the tanh approximation, timm's is exact.
LAYER_NORM_EPS = 1e-6
HIDDEN_ACT = {"timm": "gelu", "npz": "gelu_pytorch_tanh"}
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")

# Heads of timm models whose heads are not 64 wide: by architecture, else by hidden size (huge, giant, gigantic).
TIMM_HEADS_OF_ARCHITECTURE = {"test_vit": 2}
TIMM_HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16}

# What this model cannot express, by a part of the tensor's name.
REFUSED = {
    "timm": {
        r"\bls[12]\.gamma|\bgamma_[12]$": "LayerScale",
        r"\b[qk]_norm\.": "query and key normalisation",
        r"^fc_norm\.": "global pooling (fc_norm)",
        r"^attn_pool\.": "attention pooling",
        r"^reg_token$": "register tokens",
        r"^(dist_token$|head_dist\.)": "a distillation token",
        r"^norm_pre\.": "a norm before the blocks (pre-norm)",
        r"\bmlp\.(fc1_[gx]|w12|w[123])\.": "a SwiGLU feed-forward",
        r"^patch_embed\.backbone\.": "a convolutional stem",
    },
    "npz": {
        r"^(conv_root|gn_root|block\d)/": "a convolutional stem",
        r"^MAPHead_0/": "attention pooling",
        r"^pos_embedding$|/MultiHeadDotProductAttention_0/": "big_vision's later layout",
    },
}
# Options in a timm config.json that change the mathematics and leave no trace in the tensors.
TIMM_DEFAULTS = {
    "act_layer": ("gelu",), "norm_layer": ("layernorm",), "pos_embed": ("learn",), "global_pool": ("", "token"),
    "no_embed_class": (False,), "final_norm": (True,),
}  # fmt: skip

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TORCH_SUFFIXES = (".bin", ".pth", ".pt")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A Vision Transformer read from any format.

    config: as transformers would read it. state_dict: hub names, those of ViTForImageClassification where there is a
    classifier, else those of ViTModel. image_mean, image_std: one float a channel, for pixels in 0..1. image_size:
    (height, width) that pictures are resized to. resample: the filter, a PIL.Image.Resampling number.
    """

    config: ViTConfig
    state_dict: dict[str, Tensor]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    image_size: tuple[int, int]
    resample: int
    source_format: Format


def read_checkpoint(source: str | Path, *, num_heads: int | None = None) -> Checkpoint:
    """Read a checkpoint; the format is recognised.

    source: a Hugging Face or timm folder, a timm .safetensors, .pth, .pt or .bin file (torch files are read without
    running any code in them), or an .npz file. num_heads: attention heads, which a timm file does not record: needed
    when they are not 64 wide and the architecture is not known; elsewhere it must agree with the checkpoint.
    Raises InputError when the checkpoint cannot be read or holds what this model cannot express.
    """
    source = Path(source)
    if source.is_dir():
        config = read_json(source / "config.json")
        if "architecture" in config:
            checkpoint = read_timm(source, read_weights(source), config, num_heads)
        else:
            checkpoint = read_hf(source, config)
    elif not source.is_file():
        raise InputError(f"{source}: no such file or folder")
    elif source.suffix == ".npz":
        checkpoint = read_npz(source)
    elif source.suffix == ".safetensors" or source.suffix in TORCH_SUFFIXES:
        checkpoint = read_timm(source, read_tensors(source), {}, num_heads)
    else:
        expected = ", ".join((".safetensors", *TORCH_SUFFIXES, ".npz"))
        raise InputError(f"{source}: expected a folder or a file ending in {expected}, got {source.suffix!r}")
    if num_heads not in (None, checkpoint.config.num_attention_heads):
        raise InputError(f"num_heads: {source} has {checkpoint.config.num_attention_heads} heads, got {num_heads}")
    return checkpoint


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    to: Format | None = None,
    num_heads: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert the checkpoint `source` to another format at `dest`, and return `dest`.

    to: "hf" writes a folder that transformers loads (config.json, model.safetensors, preprocessor_config.json), "timm"
    a .safetensors file, "npz" an .npz file; by default told from dest's suffix, a folder when it is neither.
    source and num_heads: as in `read_checkpoint`. overwrite: replace `dest` where it exists; a folder is replaced only
    when it is a checkpoint without folders in it.

    The tensors are carried over bit for bit (bfloat16 becomes float32 in npz, which has no such type). timm and npz
    files have no place for labels and picture settings, nor for layer_norm_eps and hidden_act, where a warning says
    that the model will be computed with others. When the conversion fails, nothing is left at `dest` or beside it.
    Raises InputError as `read_checkpoint` does, and when dest exists or does not suit the format.
    """
    dest = Path(dest)
    if to is None:
        to = "timm" if dest.suffix == ".safetensors" else "npz" if dest.suffix == ".npz" else "hf"
    check_dest(dest, to, overwrite)
    checkpoint = read_checkpoint(source, num_heads=num_heads)
    write = {"hf": write_hf, "timm": write_timm, "npz": write_npz}[to]
    # The scratch folder stands beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.absolute().parent) as scratch:
        fresh = Path(scratch) / ("new" + dest.suffix)
        write(checkpoint, fresh)
        put_in_place(fresh, dest, Path(scratch) / "old")
    return dest


# ---------------------------------------------------------------------------------------------------------------------
# Which parameters a checkpoint has, and of which shapes
# ---------------------------------------------------------------------------------------------------------------------


def list_parameters(depth: int, *, qkv_bias: bool, pooler: bool, classifier: bool, prefix: str) -> list[Parameter]:
    """The rows of one model, layers numbered; `prefix` goes before the hub names of all but the classifier."""
    block = BLOCK + QKV_BIAS if qkv_bias else BLOCK
    rows = list(EMBEDDINGS)
    for layer in range(depth):
        rows += [Parameter(*(field.format(layer) for field in row)) for row in block]
    rows += FINAL_NORM + POOLER if pooler else FINAL_NORM
    rows = [row._replace(hf=prefix + row.hf) for row in rows]
    return rows + list(CLASSIFIER) if classifier else rows


def has_any(names: Mapping[str, Any], rows: Sequence[Parameter], fmt: Format) -> bool:
    return any(getattr(row, fmt).format(0) in names for row in rows)


def count_layers(names: Mapping[str, Any], fmt: Format) -> int:
    """How many different layers are named, at least one: `check_tensors` then names what is missing."""
    stem = getattr(BLOCK[0], fmt).partition("{}")[0]
    layers = (re.match(re.escape(stem) + r"(\d+)\b", name) for name in names)
    return max(1, len({match[1] for match in layers if match}))


def refuse_foreign_parts(names: Mapping[str, Any], fmt: Format, source: Path) -> None:
    for pattern, meaning in REFUSED[fmt].items():
        for name in names:
            if re.search(pattern, name):
                raise InputError(f"{source}: {name}: {meaning}: this model cannot express it")
    cls_token = getattr(EMBEDDINGS[2], fmt)
    if has_any(names, EMBEDDINGS[:1], fmt) and cls_token not in names:
        raise InputError(f"{source}: no tensor {cls_token}: a model without a class token cannot be expressed")


def group_by_name(rows: Sequence[Parameter], fmt: Format) -> dict[str, list[Parameter]]:
    groups: dict[str, list[Parameter]] = {}
    for row in rows:
        groups.setdefault(getattr(row, fmt), []).append(row)
    return groups


def check_tensors(
    tensors: Mapping[str, Tensor], rows: Sequence[Parameter], fmt: Format, sizes: Sizes, source: Path
) -> Sizes:
    """Account for every tensor, and return the size of each symbol of the shapes.

    A symbol that `sizes` does not hold takes its value from the first tensor that has it; all others must agree.
    """
    groups = group_by_name(rows, fmt)
    sizes = {"1": 1, **sizes}
    for name, group in groups.items():
        symbols = (group[0].npz_shape if fmt == "npz" else group[0].shape).split()
        if name in tensors and tensors[name].ndim == len(symbols):
            for symbol, size in zip(symbols, tensors[name].shape, strict=True):
                sizes.setdefault(symbol, size)
        expected = [sizes.get(symbol, symbol) for symbol in symbols]
        if len(group) > 1:
            expected[0] = len(group) * sizes["D"]
        shape = "[" + ", ".join(map(str, expected)) + "]"
        if name not in tensors:
            raise InputError(f"{source}: tensor {name} is missing: expected shape {shape}")
        found = list(tensors[name].shape)
        if found != expected or 0 in found:
            raise InputError(f"{source}: tensor {name}: expected shape {shape}, found {found}")
        if tensors[name].dtype not in DTYPES:
            raise InputError(f"{source}: tensor {name}: expected floating point weights, found {tensors[name].dtype}")
    for name in tensors:
        if name not in groups:
            found = list(tensors[name].shape)
            raise InputError(
                f"{source}: tensor {name} of shape {found} is unexpected: this model has no such parameter"
            )
    return sizes


def sizes_of(config: ViTConfig) -> Sizes:
    """The size of each symbol according to a config."""
    patch_height, patch_width = as_pair(config.patch_size)
    height, width = as_pair(config.image_size)
    sizes: Sizes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "C": config.num_channels,
        "h": patch_height,
        "w": patch_width,
        "O": config.pooler_output_size or config.hidden_size,
    }
    tokens = (height // patch_height) * (width // patch_width) + 1
    return {**sizes, "L": config.num_labels or 0, "K": sizes["D"] // sizes["H"], "N": tokens}


def config_of(
    sizes: Sizes, fmt: Format, depth: int, qkv_bias: bool, labels: list[str] | None, source: Path
) -> ViTConfig:
    """The config of a timm or npz checkpoint from the sizes of its tensors."""
    grid = math.isqrt(sizes["N"] - 1)
    if grid == 0 or grid**2 != sizes["N"] - 1:
        name = getattr(EMBEDDINGS[3], fmt)
        raise InputError(f"{source}: tensor {name}: expected 1 + a square number of positions, found {sizes['N']}")
    options: dict[str, Any] = {}
    if sizes["h"] == sizes["w"]:
        # The decoder of masked image modelling paints whole patches.
        options.update(patch_size=sizes["h"], image_size=grid * sizes["h"], encoder_stride=sizes["h"])
    else:
        options.update(patch_size=[sizes["h"], sizes["w"]], image_size=[grid * sizes["h"], grid * sizes["w"]])
    if "O" in sizes:
        options["pooler_output_size"] = sizes["O"]
    if "L" in sizes:
        labels = labels or [f"LABEL_{label}" for label in range(sizes["L"])]
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    return ViTConfig(
        hidden_size=sizes["D"],
        num_hidden_layers=depth,
        num_attention_heads=sizes["H"],
        intermediate_size=sizes["F"],
        hidden_act=HIDDEN_ACT[fmt],
        layer_norm_eps=LAYER_NORM_EPS,
        num_channels=sizes["C"],
        qkv_bias=qkv_bias,
        **options,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_hf(source: Path, config_json: dict[str, Any]) -> Checkpoint:
    model_type = config_json.get("model_type")
    if model_type != "vit":
        raise InputError(
            f'{source / "config.json"}: expected model_type "vit" or a timm "architecture", got {shown(model_type)}'
        )
    config = checked_config(config_json, source / "config.json")
    sizes = sizes_of(config)
    tensors = read_weights(source)
    classifier = has_any(tensors, CLASSIFIER, "hf")
    prefix = "vit." if "vit." + EMBEDDINGS[0].hf in tensors or classifier else ""
    parts = {
        "qkv_bias": config.qkv_bias,
        # Beside a classifier a pooler has no place in transformers: it is reported as an unexpected tensor.
        "pooler": not classifier and any(prefix + row.hf in tensors for row in POOLER),
        "classifier": classifier,
    }
    depth = config.num_hidden_layers
    if depth > len(tensors):
        raise InputError(f"{source}: config: num_hidden_layers is {depth}, but there are only {len(tensors)} tensors")
    rows = list_parameters(depth, **parts, prefix=prefix)
    check_tensors(tensors, rows, "hf", sizes, source)
    # A classification model that was saved without classes is a ViTModel: its names lose their prefix.
    target = list_parameters(depth, **parts, prefix="vit." if classifier else "")
    state_dict = {new.hf: tensors[old.hf] for new, old in zip(target, rows, strict=True)}
    return Checkpoint(config, state_dict, *read_image_processor(source, config), source_format="hf")


def read_image_processor(source: Path, config: ViTConfig) -> ImageSettings:
    """Mean, std, size and filter from preprocessor_config.json; the defaults of ViTImageProcessor without the file."""
    path = source / "preprocessor_config.json"
    return image_settings(read_json(path) if path.is_file() else {}, config, path)


def image_settings(settings: Mapping[str, Any], config: ViTConfig, path: Path) -> ImageSettings:
    """Mean, std, size and filter from the content of a preprocessor_config.json."""
    if not settings.get("do_rescale", True):
        raise InputError(f"{path}: do_rescale: expected true, got {shown(settings['do_rescale'])}")
    factor = settings.get("rescale_factor", 1 / 255)
    if not is_real(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise InputError(f"{path}: rescale_factor: expected 1/255, got {shown(factor)}")
    if settings.get("do_normalize", True):
        half = [0.5] * config.num_channels
        mean, std = settings.get("image_mean", half), settings.get("image_std", half)
    else:
        mean, std = [0.0] * config.num_channels, [1.0] * config.num_channels
    size = settings.get("size") or config.image_size
    if isinstance(size, dict):  # by the shortest edge, which a ViT then crops to its image size
        size = [size["height"], size["width"]] if {"height", "width"} <= size.keys() else config.image_size
    resample = settings.get("resample", Image.Resampling.BILINEAR)
    return checked_image_settings(mean, std, size, resample, config.num_channels, path)


def checked_image_settings(mean: Any, std: Any, size: Any, resample: Any, channels: int, path: Path) -> ImageSettings:
    mean, std = check_channels("image_mean", mean, channels, path), check_channels("image_std", std, channels, path)
    check_size("image_size", size, SIZE_LIMITS["image_size"], path)
    if not is_whole(resample) or resample not in list(Image.Resampling):
        raise InputError(f"{path}: resample: expected the number of a filter of Pillow, got {shown(resample)}")
    return mean, std, as_pair(size), int(resample)


def read_timm(source: Path, tensors: dict[str, Tensor], config_json: dict, num_heads: int | None) -> Checkpoint:
    if any(name.removeprefix("vit.") == EMBEDDINGS[0].hf for name in tensors):
        raise InputError(f"{source}: these are Hugging Face names: give the folder that holds its config.json")
    refuse_foreign_parts(tensors, "timm", source)
    options = timm_options(config_json, source)
    parts, tensors = foreign_parts(tensors, "timm", source)
    refuse_gated_mlp(tensors, source)
    depth = count_layers(tensors, "timm")
    rows = list_parameters(depth, **parts, prefix="vit." if parts["classifier"] else "")
    known = {"L": options["num_classes"]} if parts["classifier"] and options.get("num_classes") else {}
    sizes = check_tensors(tensors, rows, "timm", known, source)
    sizes["H"] = num_heads or timm_heads(sizes["D"], options, source)
    if sizes["H"] < 1 or sizes["D"] % sizes["H"]:
        raise InputError(f"num_heads: expected a divisor of the hidden size {sizes['D']}, got {sizes['H']}")

    state_dict: dict[str, Tensor] = {}
    for name, group in group_by_name(rows, "timm").items():
        state_dict.update(zip((row.hf for row in group), tensors[name].chunk(len(group)), strict=True))
    labels = timm_labels(options, sizes.get("L"), source)
    config = config_of(sizes, "timm", depth, parts["qkv_bias"], labels, source)
    return Checkpoint(config, state_dict, *timm_image_settings(options, config, source), source_format="timm")


def foreign_parts(tensors: dict[str, Tensor], fmt: Format, source: Path) -> tuple[dict[str, bool], dict[str, Tensor]]:
    """Which optional parts a timm or npz checkpoint has, and its tensors without a head that has no place."""
    parts = {
        "qkv_bias": has_any(tensors, QKV_BIAS, fmt),
        "pooler": has_any(tensors, POOLER, fmt),
        "classifier": has_any(tensors, CLASSIFIER, fmt),
    }
    if parts["pooler"] and parts["classifier"]:
        # The pretraining head stands on the pooler; transformers' classifier stands on the class token itself.
        head = [getattr(row, fmt) for row in CLASSIFIER]
        warnings.warn(
            f"{source}: dropped {' and '.join(head)}: transformers has no classifier on a pooler", stacklevel=2
        )
        tensors = {name: tensor for name, tensor in tensors.items() if name not in head}
        parts["classifier"] = False
    return parts, tensors


def refuse_gated_mlp(tensors: Mapping[str, Tensor], source: Path) -> None:
    """A packed SwiGLU has the names of a plain feed-forward, but fc1 is twice as high as fc2 is wide."""
    first, second = tensors.get("blocks.0.mlp.fc1.weight"), tensors.get("blocks.0.mlp.fc2.weight")
    if first is not None and second is not None and first.shape[:1] == (2 * second.shape[-1],):
        raise InputError(
            f"{source}: blocks.0.mlp.fc1.weight {list(first.shape)} with fc2 {list(second.shape)}: "
            "a SwiGLU feed-forward: this model cannot express it"
        )


def timm_options(config_json: dict[str, Any], source: Path) -> dict[str, Any]:
    """The three levels of a timm config.json as one; options that this model cannot follow are refused."""
    levels = [config_json, *(config_json.get(level) or {} for level in ("pretrained_cfg", "model_args"))]
    if not all(isinstance(level, dict) for level in levels):
        raise InputError(f"{source / 'config.json'}: expected pretrained_cfg and model_args to be JSON objects")
    options = {key: value for level in levels for key, value in level.items()}
    for key in ("num_classes", "label_names", "global_pool"):  # timm lets the top level win here
        options.update({key: config_json[key]} if key in config_json else {})
    for key, accepted in TIMM_DEFAULTS.items():
        if options.get(key) not in (None, *accepted):
            raise InputError(f"{source / 'config.json'}: {key}: expected {accepted[-1]!r}, got {shown(options[key])}")
    for key in ("num_classes", "num_heads"):
        if options.get(key) is not None and not (is_whole(options[key]) and options[key] >= 0):
            raise InputError(f"{source / 'config.json'}: {key}: expected a whole number, got {shown(options[key])}")
    return options


def timm_heads(hidden_size: int, options: dict[str, Any], source: Path) -> int:
    heads = (
        options.get("num_heads")
        or TIMM_HEADS_OF_ARCHITECTURE.get(str(options.get("architecture")))
        or TIMM_HEADS_OF_WIDTH.get(hidden_size)
    )
    if heads is None and hidden_size % 64:
        raise InputError(
            f"num_heads: {source} does not record it, and its hidden size {hidden_size} is not a multiple of the usual "
            "64 a head: name the number of heads (--heads)"
        )
    return int(heads or hidden_size // 64)


def timm_labels(options: dict[str, Any], num_labels: int | None, source: Path) -> list[str] | None:
    names = options.get("label_names")
    if not names or num_labels is None:
        return None
    if isinstance(names, dict):
        names = [names.get(str(index)) for index in range(len(names))]
    if not isinstance(names, list):
        raise InputError(f"{source / 'config.json'}: label_names: expected a list of names, got {shown(names)}")
    if len(names) != num_labels or not all(isinstance(name, str) for name in names):
        warnings.warn(f"{source}: label_names ignored: expected {num_labels} names, got {len(names)}", stacklevel=2)
        return None
    return list(names)


def timm_image_settings(options: dict, config: ViTConfig, source: Path) -> ImageSettings:
    """Mean, std, size and filter; timm's crop_pct is left out, a ViTImageProcessor resizes the whole picture."""
    mean, std = options.get("mean"), options.get("std")
    if mean is None or std is None:
        warnings.warn(f"{source} does not record mean and std of its pictures: 0.5 is assumed", stacklevel=2)
        mean = std = [0.5] * config.num_channels
    name = options.get("interpolation") or "bicubic"
    resample = Image.Resampling.__members__.get(str(name).upper())
    if resample is None:
        raise InputError(f"{source}: interpolation: expected a filter of Pillow, got {shown(name)}")
    return checked_image_settings(mean, std, config.image_size, resample, config.num_channels, source)


def read_npz(source: Path) -> Checkpoint:
    tensors = read_arrays(source)
    refuse_foreign_parts(tensors, "npz", source)
    parts, tensors = foreign_parts(tensors, "npz", source)
    depth = count_layers(tensors, "npz")
    rows = list_parameters(depth, **parts, prefix="vit." if parts["classifier"] else "")
    sizes = check_tensors(tensors, rows, "npz", {}, source)
    if sizes["H"] * sizes["K"] != sizes["D"]:
        raise InputError(
            f"{source}: expected heads x head size = hidden size, found {sizes['H']} x {sizes['K']} and {sizes['D']}"
        )

    state_dict = {}
    for row in rows:
        symbols = row.shape.split()
        order = JAX_ORDER[len(symbols)]
        jax_order_shape = [sizes[symbols[dim]] for dim in order]
        state_dict[row.hf] = tensors[row.npz].reshape(jax_order_shape).permute(*np.argsort(order).tolist())
    config = config_of(sizes, "npz", depth, parts["qkv_bias"], None, source)
    # The authors' input pipeline: bilinear, pixels in -1..1.
    half = (0.5,) * config.num_channels
    size = as_pair(config.image_size)
    return Checkpoint(config, state_dict, half, half, size, int(Image.Resampling.BILINEAR), source_format="npz")


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(checkpoint: Checkpoint) -> list[Parameter]:
    classifier = CLASSIFIER[0].hf in checkpoint.state_dict
    return list_parameters(
        checkpoint.config.num_hidden_layers,
        qkv_bias=checkpoint.config.qkv_bias,
        pooler=POOLER[0].hf in checkpoint.state_dict,
        classifier=classifier,
        prefix="vit." if classifier else "",
    )


def write_hf(checkpoint: Checkpoint, folder: Path) -> None:
    config, state_dict = checkpoint.config, checkpoint.state_dict
    classifier = CLASSIFIER[0].hf in state_dict
    if not classifier and POOLER[0].hf not in state_dict:
        warnings.warn(
            "the checkpoint has neither classifier nor pooler: transformers' ViTModel builds a pooler of random "
            "weights unless it is loaded with add_pooling_layer=False",
            stacklevel=2,
        )
    config.architectures = ["ViTForImageClassification" if classifier else "ViTModel"]
    config.dtype = next(iter(state_dict.values())).dtype
    folder.mkdir()
    config.save_pretrained(folder)
    save_tensors(state_dict, folder / "model.safetensors")
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": dict(zip(("height", "width"), checkpoint.image_size, strict=True)),
        "resample": checkpoint.resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(checkpoint.image_mean),
        "image_std": list(checkpoint.image_std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_timm(checkpoint: Checkpoint, path: Path) -> None:
    check_writable_config(checkpoint.config, "timm")
    groups = group_by_name(rows_of(checkpoint), "timm")
    state_dict = checkpoint.state_dict
    save_tensors({name: torch.cat([state_dict[row.hf] for row in group]) for name, group in groups.items()}, path)


def write_npz(checkpoint: Checkpoint, path: Path) -> None:
    check_writable_config(checkpoint.config, "npz")
    sizes = {"1": 1, **sizes_of(checkpoint.config)}
    arrays = {}
    for row in rows_of(checkpoint):
        tensor = checkpoint.state_dict[row.hf]
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        tensor = tensor.permute(JAX_ORDER[tensor.ndim])
        arrays[row.npz] = tensor.reshape([sizes[symbol] for symbol in row.npz_shape.split()]).numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]  # a name could be that of an option; none of these is


def check_writable_config(config: ViTConfig, to: Format) -> None:
    """Refuse, or where the difference is within rounding of training warn of, what the format cannot record."""
    if config.hidden_act not in GELUS:
        raise InputError(
            f"config.hidden_act: a {to} checkpoint means {HIDDEN_ACT[to]!r}, got {shown(config.hidden_act)}"
        )
    if config.pooler_act != "tanh":
        raise InputError(f"config.pooler_act: a {to} checkpoint means 'tanh', got {shown(config.pooler_act)}")
    means = {"layer_norm_eps": LAYER_NORM_EPS, "hidden_act": HIDDEN_ACT[to]}
    # Two names of one function.
    given = {"layer_norm_eps": config.layer_norm_eps, "hidden_act": config.hidden_act.replace("_new", "_pytorch_tanh")}
    for option, value in given.items():
        if value != means[option]:
            warnings.warn(
                f"config.{option}: {value} cannot be recorded: {to} code computes with {means[option]}", stacklevel=2
            )


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, from the first of `WEIGHT_FILES` that it has."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: expected one of {', '.join(WEIGHT_FILES)}, found none")
    if path.suffix != ".json":
        return read_tensors(path)
    tensors: dict[str, Tensor] = {}
    for shard in shard_names(path):
        tensors.update(read_tensors(folder / shard))
    return tensors


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names; they stand beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: expected a weight_map of tensors to files, got {shown(weight_map)}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: expected the names of files beside it, got {shown(shard)}")
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
        raise InputError(f"{path}: not a readable file of tensors alone: {shown_error(error)}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path}: expected a state dict of named tensors")
    named = {str(name).removeprefix("module."): tensor.detach() for name, tensor in tensors.items()}
    for name, tensor in named.items():
        if plain and not is_plain_tensor(tensor):
            raise InputError(f"{path}: tensor {printable(name)}: expected values that the file holds, found a view")
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
MOST_EXPANSION = 50
EXPANSION_FREE = 2**26  # bytes: small files of equal numbers do no harm


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The parameters of an .npz file; where they stand below a prefix, what is outside is the optimiser's state."""
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        if expanded > max(EXPANSION_FREE, MOST_EXPANSION * path.stat().st_size):
            raise InputError(f"{path}: expected weights, found {path.stat().st_size:,} bytes that grow to {expanded:,}")
        with np.load(path, allow_pickle=False) as archive:
            prefixes = ("params/", "opt/target/")
            prefix = next((p for p in prefixes if any(name.startswith(p) for name in archive.files)), "")
            arrays = {name.removeprefix(prefix): archive[name] for name in archive.files if name.startswith(prefix)}
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile raise each their own
        raise InputError(f"{path}: not a readable .npz file of plain arrays: {shown_error(error)}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
            found = getattr(array, "dtype", type(array).__name__)
            raise InputError(f"{path}: array {printable(name)}: expected floating point weights, found {found}")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Copies, because safetensors refuses tensors that share storage, as the parts of one fused tensor do.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors creates files that the owner alone can read, whatever the umask says
    save_file(copies, path, metadata={"format": "pt"})
    path.chmod(mode)


def check_dest(dest: Path, to: Format, overwrite: bool) -> None:
    suffix = {"hf": "", "timm": ".safetensors", "npz": ".npz"}.get(to)
    if suffix is None:
        raise InputError(f"to: expected hf, timm or npz, got {to!r}")
    if suffix and dest.suffix != suffix:
        raise InputError(f"dest: expected a file ending in {suffix} for {to}, got {dest}")
    if not suffix and dest.suffix in (".safetensors", ".npz", *TORCH_SUFFIXES):
        raise InputError(f"dest: expected the name of a folder for hf, or a .safetensors or .npz file, got {dest}")
    if not dest.absolute().parent.is_dir():
        raise InputError(f"dest: no such folder: {dest.parent}")
    if not dest.exists():
        return
    if not overwrite:
        raise InputError(f"dest: {dest} exists already: choose another name, or overwrite it (--overwrite)")
    if dest.is_dir() == bool(suffix):
        raise InputError(f"dest: {dest} is a {'folder' if suffix else 'file'}: not overwritten by the other kind")
    # A mistyped name must not cost a home directory or a repository.
    if dest.is_dir() and (not (dest / "config.json").is_file() or any(entry.is_dir() for entry in dest.iterdir())):
        raise InputError(f"dest: {dest} is not a folder that holds a checkpoint alone: not overwritten")


def put_in_place(fresh: Path, dest: Path, old: Path) -> None:
    """Rename `fresh` to `dest`; a folder in the way goes to `old`, and comes back should the rename fail."""
    if not dest.is_dir():
        fresh.replace(dest)
        return
    dest.rename(old)
    try:
        fresh.rename(dest)
    except OSError:
        old.rename(dest)
        raise
