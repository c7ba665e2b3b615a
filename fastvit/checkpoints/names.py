"""The names and shapes of a Vision Transformer's parameters in three formats: Hugging Face, timm and JAX (npz).

The rows of `Parameter` below are the whole map: one for each parameter, with its name in each format.

Shapes: D hidden size, F feed-forward size, H heads of K features, C channels, h x w pixels a patch, N tokens (class
token and patches), L labels, O pooler size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Format = Literal["hf", "timm", "npz"]
Sizes = dict[str, int]


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


def list_parameters(depth: int, *, qkv_bias: bool, pooler: bool, classifier: bool, prefix: str) -> list[Parameter]:
    """The rows of one model, layers numbered; `prefix` goes before the hub names of all but the classifier."""
    block = BLOCK + QKV_BIAS if qkv_bias else BLOCK
    rows = list(EMBEDDINGS)
    for layer in range(depth):
        rows += [Parameter(*(field.format(layer) for field in row)) for row in block]
    rows += FINAL_NORM + POOLER if pooler else FINAL_NORM
    rows = [row._replace(hf=prefix + row.hf) for row in rows]
    return rows + list(CLASSIFIER) if classifier else rows


def contains_any(names: Mapping[str, Any], rows: Sequence[Parameter], fmt: Format) -> bool:
    return any(getattr(row, fmt).format(0) in names for row in rows)


def count_layers(names: Mapping[str, Any], fmt: Format) -> int:
    """How many different layers are named, at least one: `check_tensors` then names what is missing."""
    stem = getattr(BLOCK[0], fmt).partition("{}")[0]
    layers = (re.match(re.escape(stem) + r"(\d+)\b", name) for name in names)
    return max(1, len({match[1] for match in layers if match}))


def group_by_name(rows: Sequence[Parameter], fmt: Format) -> dict[str, list[Parameter]]:
    groups: dict[str, list[Parameter]] = {}
    for row in rows:
        groups.setdefault(getattr(row, fmt), []).append(row)
    return groups
