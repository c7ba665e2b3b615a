"""The pre-LayerNorm block of every Vision Transformer, computed by fused operations.

    h = x + drop_path(scale1 * dropout(attention(norm1(x))))
    y = h + drop_path(scale2 * dropout(feed_forward(norm2(h))))        scales and drop path if the model has them

An `Adapter` describes where a model family's block stores its parts. `make_block_forward` builds the fused forward that
replaces the block's own. The parts are read at every call: if one was replaced, wrapped (LoRA, quantisation) or hooked,
the block runs its own forward.

A block ends with a residual add, and the next one begins with a LayerNorm; the two are one operation. `compute_block`
therefore accepts and returns an unfinished sum, `Stream`; a caller that runs a single block completes it with
`sum_stream`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastvit import ops
from fastvit.errors import InputError
from fastvit.ops import reference, varlen
from fastvit.ops.varlen import Mask, Packing

try:  # transformers collects attention maps with hooks that are never removed
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # then they count like all other hooks
    _active_collector = None

logger = logging.getLogger("fastvit")

PLAIN_WEIGHTS = (nn.Parameter, Tensor, FakeTensor)  # FakeTensor: under torch.export


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks, or a forward replaced by a device map."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a fused operation may read the parameters of `module` instead of calling it.

    It must be an unhooked `kind` with an ordinary weight: not wrapped, parametrised or quantised.
    """
    return type(module) is kind and not is_hooked(module) and type(module.weight) in PLAIN_WEIGHTS


class Fp8Linear(nn.Module):
    """A linear layer for inference with e4m3 weight and input rows, each row with a float32 scale.

    Buffers: weight [F, K] e4m3, scale [F, 1] float32, bias [F] bfloat16 or None. Maps [..., K] to [..., F] bfloat16.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def __init__(self, layer: nn.Linear):
        super().__init__()
        values, scale = reference.quantize_rows(layer.weight)
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(torch.bfloat16, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        self.check_inference(x)
        return ops.linear_fp8(*ops.quantize_rows(x), self.weight, self.scale, self.bias)

    def check_inference(self, x: Tensor) -> None:
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise InputError("model: quantised to fp8, for inference only: call eval() and disable gradients")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Called by `.to`, `.float` and the like: the buffers move to another device but keep their dtypes."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


class FeedForward(NamedTuple):
    """second(activation(first(x))); gated: second(silu(gate(x)) * up(x)), where first is (gate, up) or both in one."""

    first: tuple[nn.Module, ...]
    second: nn.Module
    activation: nn.Module | str
    gated: bool = False
    hidden_dropout: float = 0.0  # between the two layers; the fused operation has none


class Branch(NamedTuple):
    """The operations on a branch before it is added to the residual."""

    dropouts: tuple[nn.Module, ...] = ()
    scale: Tensor | None = None  # LayerScale, [D]
    drop_path: nn.Module | None = None  # must multiply each image by a factor


class Block(NamedTuple):
    """The parts of one block."""

    norm1: nn.Module
    qkv: tuple[nn.Module, ...]  # query, key and value; or one layer that computes all three
    num_heads: int
    attention_scale: float
    attention_dropout: float  # the current rate: zero in eval mode
    projection: nn.Module
    after_attention: Branch
    norm2: nn.Module
    feed_forward: FeedForward
    after_feed_forward: Branch
    bypassed: tuple[nn.Module, ...]  # the modules that own these parts, whose forward is not called
    attention_implementation: str = "sdpa"
    unsupported_reason: str | None = None  # why the fused forward does not support this block


class Inputs(NamedTuple):
    """The arguments of one call of a block."""

    hidden_states: Tensor
    mask: Mask = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never modified
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # of queries and keys [B, H, N, head_dim]
    output_attentions: bool = False


def read_default_inputs(
    layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Inputs:
    """The arguments of most blocks in transformers."""
    return Inputs(hidden_states, attention_mask, options)


class Adapter(NamedTuple):
    """One family's block: its class, where its parts are, and how it is called."""

    family: str
    class_name: str  # qualified; blocks are recognised by name, so that no library has to be imported
    read_block: Callable[[Any], Block]
    read_inputs: Callable[..., Inputs] = read_default_inputs
    find_refusal: Callable[[Any], str | None] = lambda layer: None  # why a block of this class is not supported


# ---------------------------------------------------------------------------------------------------------------------
# Whether a block supports the fused forward
# ---------------------------------------------------------------------------------------------------------------------

# transformers' attention functions that compute attention and nothing else; a user's own may do more.
STANDARD_ATTENTION = ("eager", "sdpa", "fastvit", "flash_attention_2", "flash_attention_3", "flex_attention")

# Options that models pass to their blocks without an effect there.
HARMLESS_OPTIONS = (
    "interpolate_pos_encoding",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
)

NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    "timm.layers.norm.LayerNorm",
    "fastvit.models.vit.LayerNorm",
)

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


def get_qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def find_activation_name(activation: nn.Module | str) -> str | None:
    """The activation's name, a key of `ops.ACTIVATIONS` or "silu"; None if it has none."""
    if isinstance(activation, str):
        return activation
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    return ACTIVATIONS.get(get_qualified_name(type(activation)))


def is_plain_norm(norm: Any) -> bool:
    return (
        get_qualified_name(type(norm)) in NORMS
        and type(norm.weight) in PLAIN_WEIGHTS
        and type(norm.bias) in PLAIN_WEIGHTS
        and norm.weight.ndim == 1
        and not getattr(norm, "_fast_norm", False)  # timm's, which rounds differently under autocast
        and not is_hooked(norm)
    )


def has_active_hooks(module: nn.Module) -> bool:
    """Whether bypassing `module` would skip a hook; transformers' own hooks count only while they collect."""
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


def find_drop_path(module: nn.Module) -> nn.Module | None:
    """A block's drop path; None for the Identity that replaces it when the rate is 0."""
    return None if type(module) is nn.Identity and not is_hooked(module) else module


def examine(adapter: Adapter, layer: nn.Module) -> tuple[Block, None] | tuple[None, str]:
    """The block's current parts; or None, and the reason why the block has to run its own forward."""
    try:
        block = adapter.read_block(layer)
    except AttributeError:
        return None, "its parts are not where they were expected; another version of its library?"
    reason = block_unsupported_reason(block)
    return (block, None) if reason is None else (None, reason)


def is_fp8(block: Block) -> bool:
    return type(block.projection) is Fp8Linear


def block_unsupported_reason(block: Block) -> str | None:
    if block.unsupported_reason:
        return block.unsupported_reason
    feed_forward = block.feed_forward
    kind = Fp8Linear if is_fp8(block) else nn.Linear  # all layers of a block are quantised, or none
    for linear in (*block.qkv, block.projection, *feed_forward.first, feed_forward.second):
        if not is_plain(linear, kind):
            return f"a linear layer is wrapped, hooked or quantised: {get_qualified_name(type(linear))}"
    for norm in (block.norm1, block.norm2):
        if not is_plain_norm(norm):
            return f"a norm is hooked, or not a plain LayerNorm with weight and bias: {get_qualified_name(type(norm))}"
    drop_paths = (block.after_attention.drop_path, block.after_feed_forward.drop_path)
    for module in (*block.bypassed, feed_forward.activation, *drop_paths):
        if isinstance(module, nn.Module) and has_active_hooks(module):
            return f"attention maps are requested, or there is a hook on {get_qualified_name(type(module))}"
    activation = find_activation_name(feed_forward.activation)
    if activation != "silu" if feed_forward.gated else activation not in ops.ACTIVATIONS:
        return f"there is no operation for the activation {get_qualified_name(type(feed_forward.activation))}"
    if feed_forward.hidden_dropout:
        return "there is dropout inside the feed-forward"
    if block.attention_implementation == "eager" and torch.is_grad_enabled():
        return "its attention is 'eager', which has second derivatives; it is fused under torch.no_grad(), or as 'sdpa'"
    if block.attention_implementation not in STANDARD_ATTENTION:
        return f"its attention is {block.attention_implementation!r}"
    return None


def inputs_unsupported_reason(inputs: Inputs) -> str | None:
    """The reason why a call with these arguments needs the block's own forward, or None."""
    for name, value in inputs.options.items():
        if value is not None and value is not False and name not in HARMLESS_OPTIONS:
            return f"it is called with {name}"
    mask = inputs.mask
    if not (mask is None or isinstance(mask, Packing) or (isinstance(mask, Tensor) and mask.ndim == 4)):
        return "its mask is not a tensor [B, heads, queries, keys]"
    return None


# Constant for a compiler that traces a block, which then logs nothing at run time.
@torch.compiler.assume_constant_result
def log_fallback(family: str, reason: str) -> None:
    """Log once per family and reason that blocks run their own forward."""
    _log_fallback(family, reason)


@functools.cache
def _log_fallback(family: str, reason: str) -> None:
    logger.info("optimize: a block of %s runs its own forward: %s", family, reason)


# ---------------------------------------------------------------------------------------------------------------------
# The fused forward
# ---------------------------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """Hidden states as an unfinished sum, residual + row_scale * scale * branch; just branch if residual is None."""

    branch: Tensor  # [B, N, D], like residual
    residual: Tensor | None = None
    scale: Tensor | None = None  # LayerScale, [D]
    row_scale: Tensor | None = None  # drop path, float32 [B]


Rows = Tensor | tuple[Tensor, Tensor]  # [..., K]; in fp8 the values and their scale [..., 1]


def sum_stream(stream: Stream) -> Tensor:
    """Complete the sum. Returns [B, N, D]."""
    branch, residual, scale, row_scale = stream
    if residual is None:
        return branch
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
    return residual + branch if scale is None else torch.addcmul(residual, branch, scale)


def compute_block(block: Block, stream: Stream, inputs: Inputs, class_token_only: bool = False) -> tuple[Stream, Any]:
    """Apply one block to `stream`.

    Args:
        block: the block's parts.
        stream: the hidden states; those in `inputs` are ignored.
        inputs: the other arguments.
        class_token_only: compute the class token alone, [B, 1, D].

    Returns:
        The stream, and the attention maps if inputs request them: [B, heads, Nq, N], or a list, one per packed image.
    """
    if isinstance(block.projection, Fp8Linear):
        block.projection.check_inference(stream.branch)
    residual, context, probabilities = attend(block, stream, inputs, class_token_only)
    rows = ops.quantize_rows(context) if is_fp8(block) else context
    branch = linear(rows, join_weights((block.projection,)))
    stream = build_stream(branch, residual, block.after_attention, inputs.mask)
    residual, branch = feed_forward(block, stream)
    return build_stream(branch, residual, block.after_feed_forward, inputs.mask), probabilities


def attend(
    block: Block, stream: Stream, inputs: Inputs, class_token_only: bool
) -> tuple[Tensor, Tensor, Tensor | list[Tensor] | None]:
    """Returns the residual, the context [B, Nq, heads * head_dim] and, if requested, the attention maps."""
    fp8, mask, heads = is_fp8(block), inputs.mask, block.num_heads
    options: dict[str, Any] = {"scale": block.attention_scale, "dropout_p": block.attention_dropout}
    one_query = class_token_only and not isinstance(mask, Packing)
    # On a CPU, concatenating the weights costs more than three matmuls instead of one.
    is_separate = len(block.qkv) == 3 and (one_query or not (fp8 or ops.uses_kernels(stream.branch)))
    if is_separate:
        residual, rows = add_norm(stream, block.norm1, fp8)
        parts = (select_class_rows(rows) if one_query else rows, rows, rows)
        states = [linear(part, join_weights((layer,))) for part, layer in zip(parts, block.qkv, strict=True)]
        query, key, value = (state.unflatten(-1, (heads, -1)) for state in states)
    else:
        residual, qkv = add_norm_linear(stream, block.norm1, join_weights(block.qkv), fp8)
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    if isinstance(mask, Tensor):
        mask = mask[:, :, :1] if one_query else mask
        mask = mask.to(query.dtype) if fp8 and mask.is_floating_point() else mask
    if inputs.rotate is not None:
        query, key = inputs.rotate(query.transpose(1, 2), key.transpose(1, 2))
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    probabilities = None
    if inputs.output_attentions and torch.is_grad_enabled():  # maps that are not used for the output have no gradients
        context, probabilities = varlen.attend_with_maps(query, key, value, mask, **options)
    elif is_separate or inputs.rotate is not None:
        context = varlen.attend(ops.attention, query, key, value, mask=mask, **options)
    else:
        context = varlen.attend(ops.attention_packed, qkv, mask=mask, num_heads=heads, **options)
    if inputs.output_attentions and probabilities is None:
        probabilities = varlen.attention_probabilities(query, key, mask, block.attention_scale)
    if class_token_only:
        residual = varlen.select_class_tokens(residual, mask)
        context = context if one_query else varlen.select_class_tokens(context, mask)
    return residual, context, probabilities


def feed_forward(block: Block, stream: Stream) -> tuple[Tensor, Tensor]:
    """Returns the residual and the branch."""
    norm, part = block.norm2, block.feed_forward
    first, second = join_weights(part.first), join_weights((part.second,))
    activation = find_activation_name(part.activation)
    is_sum = stream.residual is not None and stream.scale is None and stream.row_scale is None
    if is_fp8(block):
        residual, rows = add_norm(stream, norm, True)
        if part.gated:
            return residual, linear(ops.quantize_rows(ops.swiglu(linear(rows, first))), second)
        weight, scale, bias = first  # bias_gelu_fp8 adds the bias, in float32
        return residual, linear(ops.bias_gelu_fp8(linear(rows, (weight, scale, None)), bias, activation), second)
    if is_sum and not part.gated:
        arguments: Any = (stream.branch, stream.residual, norm.weight, norm.bias, norm.eps, *first, *second, activation)
        return ops.add_layer_norm_feed_forward(*arguments)
    residual, rows = add_norm(stream, norm, False)
    if part.gated:
        return residual, linear(ops.swiglu(linear(rows, first)), second)
    return residual, ops.feed_forward(rows, *first, *second, activation)


def add_norm(stream: Stream, norm: Any, fp8: bool) -> tuple[Tensor, Any]:
    """Returns the sum and its LayerNorm, in fp8 as (values, scale), in one pass."""
    branch, residual, scale, row_scale = stream
    parameters = norm.weight, norm.bias, norm.eps
    if residual is None:
        return branch, (ops.layer_norm_fp8 if fp8 else ops.layer_norm)(branch, *parameters)
    if not fp8:
        return ops.add_layer_norm(branch, residual, *parameters, scale=scale, row_scale=row_scale)
    if scale is not None:
        branch = branch * scale
    residual, *rows = ops.add_layer_norm_fp8(branch, residual, *parameters)
    return residual, tuple(rows)


def add_norm_linear(stream: Stream, norm: Any, weights: tuple, fp8: bool) -> tuple[Tensor, Tensor]:
    """Returns the sum, and a linear layer of its LayerNorm."""
    branch, residual, scale, row_scale = stream
    if fp8 or scale is not None or row_scale is not None:
        residual, rows = add_norm(stream, norm, fp8)
        return residual, linear(rows, weights)
    if residual is None:
        return branch, ops.layer_norm_linear(branch, norm.weight, norm.bias, norm.eps, *weights)
    return ops.add_layer_norm_linear(branch, residual, norm.weight, norm.bias, norm.eps, *weights)


def join_weights(layers: Sequence[Any]) -> tuple:
    """(weight, bias) of one linear layer that computes all of `layers`; in fp8 (weight, scale, bias).

    Concatenated at each use, so that checkpoints, optimizers and LoRA see separate layers. This copies the weights at
    every call: 3.5 MB read and written for query, key and value of ViT-B in half precision. Biases are optional.
    """
    names = ("weight", "scale") if type(layers[0]) is Fp8Linear else ("weight",)
    if len(layers) == 1:
        return (*(getattr(layers[0], name) for name in names), layers[0].bias)
    tensors = [torch.cat([getattr(layer, name) for layer in layers]) for name in names]
    biases = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return (*tensors, None)
    like = next(bias for bias in biases if bias is not None)
    zeros = [like.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    return (*tensors, torch.cat(zeros))


def linear(rows: Rows, weights: tuple) -> Tensor:
    """Apply a linear layer from `join_weights`: [..., K] -> [..., F]."""
    return ops.linear(rows, *weights) if isinstance(rows, Tensor) else ops.linear_fp8(*rows, *weights)


def select_class_rows(rows: Rows) -> Rows:
    """The rows of the class tokens, [B, 1, K]."""
    return rows[:, :1] if isinstance(rows, Tensor) else (rows[0][:, :1], rows[1][:, :1])


def build_stream(branch: Tensor, residual: Tensor, after: Branch, mask: Mask) -> Stream:
    """The stream with a branch after dropout, and drop path's factor for each image.

    The model's own module draws the factors, in the dtype that the branch has after the scale: under autocast a float32
    scale promotes a bfloat16 branch to float32, and PyTorch 2.11 draws different numbers in bfloat16.
    """
    for dropout in after.dropouts:
        branch = dropout(branch)
    if after.drop_path is None or not after.drop_path.training:
        return Stream(branch, residual, after.scale)
    if isinstance(mask, Packing):
        return Stream(after.drop_path(branch, mask), residual, after.scale)
    dtype = branch.dtype if after.scale is None else torch.promote_types(branch.dtype, after.scale.dtype)
    factors = after.drop_path(branch.new_ones(len(branch), *[1] * (branch.ndim - 1), dtype=dtype))
    factors = factors.flatten()
    return Stream(branch, residual, after.scale, factors.to(torch.promote_types(factors.dtype, torch.float32)))


# ---------------------------------------------------------------------------------------------------------------------
# Attaching it to a module
# ---------------------------------------------------------------------------------------------------------------------


class FusedModule:
    """Mixin for a module whose forward is fused; always combined with the module's own class."""

    _fastvit_original: ClassVar[type[nn.Module]]
    _fastvit_rebuild: ClassVar[Callable[[Any], nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # Pickles store classes by name, and a generated class has none: store the original's.
        reduced: Any = super().__reduce_ex__(protocol)
        return (type(self)._fastvit_rebuild, (self._fastvit_original,), *reduced[2:])


def make_fused_class(original: Any, forward: Callable[..., Any], rebuild: Callable[[Any], nn.Module]) -> Any:
    """A subclass of a module's class, of the same name, that differs in `forward` alone.

    Parameters, hooks, `isinstance`, state dicts and gradient checkpointing therefore stay as they are, and a compiler
    sees an ordinary module. The name stays because device maps and FSDP policies name the classes not to be split.

    Args:
        original: the module's class.
        forward: called with the module and the arguments of its forward.
        rebuild: creates an empty module of the fused class from `original`, for copies and pickles.
    """
    names = {
        "forward": functools.wraps(original.forward)(forward),
        "_fastvit_original": original,
        "_fastvit_rebuild": staticmethod(rebuild),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original)(original.__name__, (FusedModule, original), names)


def make_block_forward(adapter: Adapter, original: Any) -> Callable[..., Any]:
    """The forward of a block of this family: fused if currently possible, otherwise its own."""

    def forward(self, *args, **kwargs):
        block, reason = examine(adapter, self)
        if block is not None:
            inputs = adapter.read_inputs(self, *args, **kwargs)
            reason = inputs_unsupported_reason(inputs)
        if reason is not None:
            log_fallback(adapter.family, reason)
            return original.forward(self, *args, **kwargs)
        stream, probabilities = compute_block(block, Stream(inputs.hidden_states), inputs)
        hidden_states = sum_stream(stream)
        return (hidden_states, probabilities) if inputs.output_attentions else hidden_states

    return forward
