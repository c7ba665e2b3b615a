"""Cases: the key under which measurements of an operation are recorded.

A case has exact sizes, and buckets of rows and tokens. Both are read at every call, also under a compiler. There the
exact sizes become constants of the compiled model, but rows and tokens only guards on their bucket's bounds, so that
other batch sizes do not recompile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.ops.tracing import needs_backward


class Case(NamedTuple):
    """The properties shared by all calls for which one choice is made.

    sizes: properties that must be equal, by name: hidden, units, heads, head_dim, ..., also an activation's name.
    rows, tokens: the upper bounds of the buckets (`row_bucket`, `token_bucket`).
    """

    operation: str
    direction: str  # "inference" or "training"
    sizes: tuple[tuple[str, int | str], ...]
    rows: int
    tokens: int
    dtype: str


def make_case(operation: str, x: Tensor, args: Any, kwargs: Any) -> tuple | None:
    """The fields of a call's `Case`, or None if such calls are not measured.

    x: the argument whose dtype the kernel computes in.
    """
    call = SIZE_READERS[operation](*args, **kwargs) if operation in SIZE_READERS else None
    if call is None:
        return None
    # operator.index specialises a compiler's symbolic integer to a constant; int does not.
    sizes = {name: value if isinstance(value, str) else operator.index(value) for name, value in call.sizes.items()}
    if torch.is_autocast_enabled(x.device.type):
        sizes["autocast"] = get_dtype_name(torch.get_autocast_dtype(x.device.type))
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    direction = "training" if needs_backward(*tensors) else "inference"
    rows, tokens = row_bucket(call.rows), token_bucket(call.tokens)
    return operation, direction, tuple(sizes.items()), rows, tokens, get_dtype_name(x.dtype)


def row_bucket(rows: int) -> int:
    """The power of two, at least 64, that `rows` rounds up to. Comparisons, which a compiler traces symbolically."""
    bucket = 64
    while bucket < rows:
        bucket *= 2
    return bucket


def token_bucket(tokens: int) -> int:
    """The multiple of 64, or from 512 on the power of two, that `tokens` rounds up to; 0 for none."""
    bucket = 0
    while bucket < tokens:
        bucket = bucket + 64 if bucket < 512 else bucket * 2
    return bucket


def get_dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# The sizes of a call; signatures as in fastvit.ops.reference
# ---------------------------------------------------------------------------------------------------------------------


class CallSizes(NamedTuple):
    """A call's exact sizes, and the rows and tokens that are put into buckets."""

    sizes: dict[str, int | str]
    rows: int
    tokens: int = 0


def _count_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _norm_sizes(x, *args, scale=None, row_scale=None, **kwargs) -> CallSizes:
    scales = {"scale": scale, "row_scale": row_scale}
    return CallSizes({"hidden": x.shape[-1], **{k: "yes" for k, v in scales.items() if v is not None}}, _count_rows(x))


def _linear_sizes(x, norm_weight, norm_bias, eps, weight, bias, activation="") -> CallSizes:
    named = {"activation": activation} if activation else {}
    return CallSizes({"hidden": x.shape[-1], "units": weight.shape[0], **named}, _count_rows(x))


def _add_linear_sizes(x, residual, *args, **kwargs) -> CallSizes:
    return _linear_sizes(x, *args, **kwargs)


def _norm_gelu_sizes(x, norm_weight, norm_bias, eps, weight, bias, activation="gelu") -> CallSizes:
    return _linear_sizes(x, norm_weight, norm_bias, eps, weight, bias, activation)


def _feed_forward_sizes(x, weight1, bias1, weight2, bias2, activation) -> CallSizes:
    return _linear_sizes(x, None, None, 0.0, weight1, bias1, activation)


def _add_feed_forward_sizes(
    x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation="gelu"
):
    return _linear_sizes(x, norm_weight, norm_bias, eps, weight1, bias1, activation)


def _activation_sizes(x, bias=None, activation="gelu") -> CallSizes:
    return CallSizes({"units": x.shape[-1], "activation": activation}, _count_rows(x))


def _norm_activation_sizes(x, weight, bias, eps, activation="gelu") -> CallSizes:
    return CallSizes({"hidden": x.shape[-1], "activation": activation}, _count_rows(x))


def _swiglu_sizes(x, bias=None) -> CallSizes:
    return CallSizes({"units": x.shape[-1] // 2}, _count_rows(x))


def _attention_sizes(query, key, value, *, cu_seqlens=None, **options) -> CallSizes | None:
    if cu_seqlens is not None:
        return None
    batch, queries, heads, head_dim = query.shape
    call = _head_sizes(heads, head_dim, batch * queries, key.shape[1], cu_seqlens=None, **options)
    if call is not None and queries == 1:  # the class token alone: as many rows as images
        call.sizes["queries"] = "one"
    return call


def _packed_attention_sizes(qkv, *, num_heads=None, cu_seqlens=None, **options) -> CallSizes | None:
    is_flat = qkv.dim() == 3 and num_heads is not None
    heads, head_dim = (num_heads, qkv.shape[-1] // (3 * num_heads)) if is_flat else qkv.shape[-2:]
    return _head_sizes(heads, head_dim, qkv.shape[0] * qkv.shape[1], qkv.shape[1], cu_seqlens=cu_seqlens, **options)


def _head_sizes(heads, head_dim, rows, tokens, *, cu_seqlens, mask=None, dropout_p=0.0, **options) -> CallSizes | None:
    if cu_seqlens is not None:  # PyTorch computes image by image: there is nothing to compare
        return None
    sizes = {"heads": heads, "head_dim": head_dim}
    if mask is not None:
        sizes["mask"] = "boolean" if mask.dtype == torch.bool else "added"
    if dropout_p:
        sizes["dropout"] = "yes"
    return CallSizes(sizes, rows, tokens)


def _patch_embed_sizes(pixels, weight, *args, patch_size, mask=None, **kwargs) -> CallSizes:
    height, width = patch_size
    is_last = pixels.shape[1] != weight.shape[1]
    sizes = {
        "hidden": weight.shape[0],
        "channels": weight.shape[1],
        "patch_height": height,
        "patch_width": width,
        "pixels": "uint8" if pixels.dtype == torch.uint8 else "floating",
        "layout": "BHWC" if is_last else "BCHW",
        **({} if mask is None else {"mask": "yes"}),
    }
    rows, columns = pixels.shape[1:3] if is_last else pixels.shape[2:4]
    return CallSizes(sizes, pixels.shape[0] * (rows // height) * (columns // width))


# Tunable operations. Those in fp8 are not: PyTorch has no faster alternative.
SIZE_READERS: dict[str, Callable[..., CallSizes | None]] = {
    "patch_embed": _patch_embed_sizes,
    "layer_norm": _norm_sizes,
    "add_layer_norm": _norm_sizes,
    "attention": _attention_sizes,
    "attention_packed": _packed_attention_sizes,
    "layer_norm_linear": _linear_sizes,
    "add_layer_norm_linear": _add_linear_sizes,
    "layer_norm_gelu": _norm_gelu_sizes,
    "feed_forward": _feed_forward_sizes,
    "add_layer_norm_feed_forward": _add_feed_forward_sizes,
    "swiglu": _swiglu_sizes,
    "bias_gelu": _activation_sizes,
    "layer_norm_act": _norm_activation_sizes,
}
