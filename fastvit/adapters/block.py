"""A pre-LayerNorm ViT block, whoever wrote it, computed by `fastvit.ops` from the parameters where they are.

    h = x + drop_path(scale1 * dropout(attention(norm1(x))))
    y = h + drop_path(scale2 * dropout(feed_forward(norm2(h))))        scales and drop path where the model has them

An adapter says where a family's block keeps its parts. Everything is read again at each call: a part may be replaced,
wrapped or watched at any time, and then the block computes itself as it always did.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit.modeling import PLAIN_WEIGHTS, is_hooked, is_plain

try:  # transformers collects attention maps through hooks that, once installed, stay
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # then these hooks count like all others
    _active_collector = None

logger = logging.getLogger("fastvit")


class FeedForward(NamedTuple):
    """second(activation(first(x))); gated: second(silu(gate(x)) * up(x)), where first is (gate, up), or both in one."""

    first: tuple[nn.Module, ...]
    second: nn.Module
    activation: nn.Module
    gated: bool = False
    hidden_dropout: float = 0.0  # between the two layers; our operation has none


class Branch(NamedTuple):
    """What happens to a branch before it is added to the residual."""

    dropouts: tuple[nn.Module, ...] = ()
    scale: Tensor | None = None  # LayerScale, [D]
    drop_path: nn.Module | None = None  # one that multiplies each picture by a factor


class Block(NamedTuple):
    """The parts of one block."""

    norm1: nn.Module
    qkv: tuple[nn.Module, ...]  # query, key and value; or one that has them side by side
    num_heads: int
    attention_scale: float
    attention_dropout: float  # now: zero in eval mode
    projection: nn.Module
    after_attention: Branch
    norm2: nn.Module
    feed_forward: FeedForward
    after_feed_forward: Branch
    bypassed: tuple[nn.Module, ...]  # modules that have these parts, whose own forward is not called
    attention_implementation: str = "sdpa"
    lacks: str | None = None  # what the block has that ours does not


class Inputs(NamedTuple):
    """What a block was called with."""

    hidden_states: Tensor
    mask: Tensor | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # of queries and keys [B, H, N, head_dim]


def read_inputs(
    layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Inputs:
    """The arguments of most blocks of transformers."""
    return Inputs(hidden_states, attention_mask, options)


class Adapter(NamedTuple):
    """One family's block: its class, where its parts are, and what it is called with."""

    family: str
    class_name: str  # with its module; blocks are recognised by it, so that nothing needs importing
    block: Callable[[Any], Block]
    inputs: Callable[..., Inputs] = read_inputs
    refuses: Callable[[Any], str | None] = lambda layer: None  # why a block of this class is not one of the family


# ---------------------------------------------------------------------------------------------------------------------
# Whether a block may be computed by ours
# ---------------------------------------------------------------------------------------------------------------------

# Attention functions of transformers that compute attention and nothing else. A user's own may do more.
STANDARD_ATTENTION = ("eager", "sdpa", "fastvit", "flash_attention_2", "flash_attention_3", "flex_attention")

# Options that models hand to their blocks and that change nothing in them.
HARMLESS_OPTIONS = (
    "interpolate_pos_encoding",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
)

NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm")

ACTIVATIONS = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_pytorch_tanh",
    "transformers.activations.NewGELUActivation": "gelu_new",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_pytorch_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Tanh": "tanh",
}


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def activation_name(activation: nn.Module) -> str | None:
    """Ours for this activation: a key of `ops.ACTIVATIONS`, or "silu"; None if there is none."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    return ACTIVATIONS.get(name_of(type(activation)))


def is_plain_norm(norm: Any) -> bool:
    return (
        name_of(type(norm)) in NORMS
        and type(norm.weight) in PLAIN_WEIGHTS
        and type(norm.bias) in PLAIN_WEIGHTS
        and norm.weight.ndim == 1
        and not getattr(norm, "_fast_norm", False)  # timm's, which rounds otherwise under autocast
        and not is_hooked(norm)
    )


def is_watched(module: nn.Module) -> bool:
    """Whether somebody would notice that `module` is not called; transformers' own hooks only while they collect."""
    if not is_hooked(module):
        return False
    hooks = module._forward_hooks.values()
    if (
        _active_collector is None
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)
    ):
        return True
    collected = _active_collector.get()
    return collected is not None and "attentions" in collected


def drop_path_of(module: nn.Module) -> nn.Module | None:
    """A block's drop path, which without a rate is an Identity."""
    return None if type(module) is nn.Identity and not is_hooked(module) else module


def examine(adapter: Adapter, layer: nn.Module) -> tuple[Block, None] | tuple[None, str]:
    """The parts of a block as they are now; or None, and why the block has to compute itself."""
    try:
        block = adapter.block(layer)
    except AttributeError:
        return None, "its parts are not where they were expected; another version of its library?"
    reason = why_left(block)
    return (block, None) if reason is None else (None, reason)


def why_left(block: Block) -> str | None:
    if block.lacks:
        return block.lacks
    feed_forward = block.feed_forward
    for linear in (*block.qkv, block.projection, *feed_forward.first, feed_forward.second):
        if not is_plain(linear, nn.Linear):
            return f"a linear layer is wrapped, watched or quantised: {name_of(type(linear))}"
    for norm in (block.norm1, block.norm2):
        if not is_plain_norm(norm):
            return f"a norm is watched, or no plain LayerNorm with weight and bias: {name_of(type(norm))}"
    drop_paths = (block.after_attention.drop_path, block.after_feed_forward.drop_path)
    for module in (*block.bypassed, feed_forward.activation, *drop_paths):
        if module is not None and is_watched(module):
            return f"attention maps are asked for, or a hook watches {name_of(type(module))}"
    activation = activation_name(feed_forward.activation)
    if activation != "silu" if feed_forward.gated else activation not in ops.ACTIVATIONS:
        return f"there is no operation for the activation {name_of(type(feed_forward.activation))}"
    if feed_forward.hidden_dropout:
        return "there is dropout inside the feed-forward"
    if block.attention_implementation not in STANDARD_ATTENTION:
        return f"its attention is {block.attention_implementation!r}"
    return None


def why_inputs_left(inputs: Inputs) -> str | None:
    """Why a call with these arguments is one for the block itself."""
    for name, value in inputs.options.items():
        if value is not None and value is not False and name not in HARMLESS_OPTIONS:
            return f"it is called with {name}"
    if inputs.mask is not None and not (isinstance(inputs.mask, Tensor) and inputs.mask.ndim == 4):
        return "its mask is not a tensor [B, heads, queries, keys]"
    return None


# A compiler that traces a block takes this as a constant, and logs nothing at run time.
@torch.compiler.assume_constant_result
def announce_left(family: str, reason: str) -> None:
    """Say once that blocks of this family compute themselves."""
    _announce(family, reason)


@functools.cache
def _announce(family: str, reason: str) -> None:
    logger.info("optimize: a block of %s computes itself: %s", family, reason)


# ---------------------------------------------------------------------------------------------------------------------
# Our forward
# ---------------------------------------------------------------------------------------------------------------------


def joined(linears: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one linear layer that computes all of these side by side; some may have no bias."""
    if len(linears) == 1:
        return linears[0].weight, linears[0].bias
    weight = torch.cat([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
    return weight, torch.cat(biases)


def finish(branch: Tensor, after: Branch) -> tuple[Tensor, Tensor | None]:
    """The branch after dropout, and drop path's factor of each picture, drawn by the model's own module."""
    for dropout in after.dropouts:
        branch = dropout(branch)
    if after.drop_path is None or not after.drop_path.training:
        return branch, None
    factors = after.drop_path(branch.new_ones(len(branch), *[1] * (branch.ndim - 1)))
    return branch, factors.flatten().float()


def attend(block: Block, qkv: Tensor, inputs: Inputs) -> Tensor:
    """[B, N, 3 * heads * head_dim] -> [B, N, heads * head_dim]."""
    scale, dropout_p, mask = block.attention_scale, block.attention_dropout, inputs.mask
    if inputs.rotate is None:
        return ops.attention_packed(qkv, num_heads=block.num_heads, scale=scale, dropout_p=dropout_p, mask=mask)
    query, key, value = qkv.unflatten(-1, (3, block.num_heads, -1)).unbind(-3)
    query, key = inputs.rotate(query.transpose(1, 2), key.transpose(1, 2))
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    return ops.attention(query, key, value, scale=scale, dropout_p=dropout_p, mask=mask)


def compute(block: Any, inputs: Inputs) -> Tensor:
    """[B, N, D] -> [B, N, D]."""
    norm1, norm2, projection = block.norm1, block.norm2, block.projection
    feed_forward, activation = block.feed_forward, activation_name(block.feed_forward.activation)
    first, second = joined(feed_forward.first), (feed_forward.second.weight, feed_forward.second.bias)
    norm = (norm2.weight, norm2.bias, norm2.eps)
    residual = inputs.hidden_states

    qkv = ops.layer_norm_linear(residual, norm1.weight, norm1.bias, norm1.eps, *joined(block.qkv))
    branch = F.linear(attend(block, qkv, inputs), projection.weight, projection.bias)
    branch, row_scale = finish(branch, block.after_attention)
    scale = block.after_attention.scale

    if scale is None and row_scale is None and not feed_forward.gated:
        residual, branch = ops.add_layer_norm_feed_forward(branch, residual, *norm, *first, *second, activation)
    else:
        residual, normed = ops.add_layer_norm(branch, residual, *norm, scale=scale, row_scale=row_scale)
        if feed_forward.gated:
            branch = F.linear(ops.swiglu(F.linear(normed, *first)), *second)
        else:
            branch = ops.feed_forward(normed, *first, *second, activation)

    branch, row_scale = finish(branch, block.after_feed_forward)
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
    scale = block.after_feed_forward.scale
    return residual + branch if scale is None else torch.addcmul(residual, branch, scale)
