"""The names and shapes of a Vision Transformer's parameters in three formats: Hugging Face, timm and JAX (npz).

The `Parameter` rows below are the complete mapping: one row per parameter, with its name in each format.

Shape symbols: D hidden size, F feed-forward size, H heads, K head dim, C channels, h x w patch size, N tokens (class
token and patches), L labels, O pooler size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Format = Literal["hf", "timm", "npz"]
Sizes = dict[str, int]


class Parameter(NamedTuple):
    """Name of a parameter in each format, with `{}` for the layer, and its shape in PyTorch and in JAX.

    Rows with the same timm name are stored as one tensor, concatenated along the first dimension.
    """

    hf: str
    timm: str
    npz: str
    shape: str
    npz_shape: str


def block_parameter(hf: str, timm: str, npz: str, shape: str, npz_shape: str) -> Parameter:
    """A parameter of a block, named relative to the block."""
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

# JAX stores a kernel as [in, out] and a convolution as [h, w, in, out]. Number of dimensions -> order of PyTorch's
# dimensions in JAX.
JAX_ORDER = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (2, 3, 1, 0)}


def list_parameters(depth: int, *, qkv_bias: bool, pooler: bool, classifier: bool, prefix: str) -> list[Parameter]:
    """Lists the parameters of a model of `depth` layers; `prefix` precedes all hub names except the classifier's."""
    block = BLOCK + QKV_BIAS if qkv_bias else BLOCK
    rows = list(EMBEDDINGS)
    for layer in range(depth):
        rows += [Parameter(*(field.format(layer) for field in row)) for row in block]
    rows += FINAL_NORM + POOLER if pooler else FINAL_NORM
    rows = [row._replace(hf=prefix + row.hf) for row in rows]
    return rows + list(CLASSIFIER) if classifier else rows


def contains_any(names: Mapping[str, Any], rows: Sequence[Parameter], fmt: Format) -> bool:
    """Whether `names` has one of the parameters, for parameters of a block that of the first block."""
    return any(getattr(row, fmt).format(0) in names for row in rows)


def count_layers(names: Mapping[str, Any], fmt: Format) -> int:
    """Counts the layers in `names`, at least one, so that `check_tensors` reports the tensors of a missing layer."""
    stem = getattr(BLOCK[0], fmt).partition("{}")[0]
    layers = (re.match(re.escape(stem) + r"(\d+)\b", name) for name in names)
    return max(1, len({match[1] for match in layers if match}))


def group_by_name(rows: Sequence[Parameter], fmt: Format) -> dict[str, list[Parameter]]:
    """Groups parameters by their name in a format: query, key and value share one name in timm."""
    groups: dict[str, list[Parameter]] = {}
    for row in rows:
        groups.setdefault(getattr(row, fmt), []).append(row)
    return groups
