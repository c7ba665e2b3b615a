"""Inference in 8 bits: `fastvit.quantize(model, "fp8")` and `fastvit.quantize(model, "int8")`.

    fp8    weights and what enters a matrix product are e4m3 with a float32 factor for each row, the products run on the
           fp8 tensor cores of sm_89 and newer. Half of bfloat16's weight memory and twice its peak rate; each number
           keeps 4 significant bits.
    int8   weights alone are 8 bits, by the package torchao; the products are those of the model's own dtype.

Patch embedding, attention itself, LayerNorm and the classifier stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops, reference
from fastvit.errors import InputError
from fastvit.modeling import (
    LayerNorm,
    ViTEncoder,
    ViTLayer,
    ViTPreTrainedModel,
    add_and_norm,
    is_hooked,
    is_plain,
    joined,
)
from fastvit.packing import Mask, Packing, attend, class_tokens_of, pictures_of


def quantize(model: ViTPreTrainedModel, kind: str) -> ViTPreTrainedModel:
    """Quantise the blocks of a model, in place, for inference.

    kind: "fp8", for GPUs of sm_89 and newer and models in bfloat16 or float32; elsewhere
        `fastvit.backend("reference")` computes the same numbers slowly, as a CPU does. Or "int8", which needs torchao.
    Returns the model, in evaluation mode and, for fp8, without parameters to train. Save it with
    `torch.save(model.state_dict(), ...)`; load that into a quantised model of the same configuration.
    Raises InputError for another kind, a model that is not ours, is quantised already or is wrapped (LoRA, hooks), and
    where the device or a size rules it out.
    """
    if kind not in KINDS:
        raise InputError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    encoders = [module for module in model.modules() if isinstance(module, ViTEncoder)]
    if not encoders:
        raise InputError(f"model: expected a Vision Transformer of fastvit, got {type(model).__name__}")
    for encoder in encoders:
        for index, layer in enumerate(encoder.layer):
            check_block(layer, f"block {index}")
    KINDS[kind](model, encoders)
    return model.eval()


def check_block(layer: nn.Module, name: str) -> None:
    """Whether nothing watches or replaces a part of the block, which quantising would lose."""
    if not isinstance(layer, ViTLayer):
        raise InputError(f"model: expected blocks that are not quantised yet, {name} is a {type(layer).__name__}")
    for path, module in layer.named_modules():
        kind = LayerNorm if isinstance(module, nn.LayerNorm) else nn.Linear
        if is_hooked(module) or (hasattr(module, "weight") and not is_plain(module, kind)):
            raise InputError(f"model: {path or 'all'} of {name} is wrapped, quantised or hooked; undo that first")


# ---------------------------------------------------------------------------------------------------------------------
# fp8
# ---------------------------------------------------------------------------------------------------------------------


def to_fp8(model: ViTPreTrainedModel, encoders: list[ViTEncoder]) -> None:
    config, device = model.config, model.device
    for option in ("hidden_size", "intermediate_size"):
        if getattr(config, option) % 16:
            raise InputError(f"config.{option}: expected a multiple of 16 for fp8, got {getattr(config, option)}")
    if model.dtype not in (torch.bfloat16, torch.float32):
        raise InputError(f"model: expected torch.bfloat16 or torch.float32 for fp8, got {model.dtype}: use .to()")
    must_run_here = device.type == "cuda" and ops.current_backend() != "reference"
    if must_run_here and (reason := ops.why_not_triton("linear_fp8", "cuda", device.index, torch.float32)):
        raise InputError(f"kind: 'fp8' cannot run here: {reason}; fastvit.backend('reference') computes it slowly")
    for encoder in encoders:
        for index, layer in enumerate(encoder.layer):
            assert isinstance(layer, ViTLayer)  # as `check_block` found
            encoder.layer[index] = Fp8ViTLayer(layer)  # one after the other: the model is never held twice
    model.requires_grad_(False)


class Fp8Linear(nn.Module):
    """A linear layer, or several side by side, of quantised rows.

    Keeps weight [F, K] e4m3, scale [F, 1] float32, and bias [F] bfloat16, as the product takes it.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def __init__(self, *layers: nn.Linear):
        super().__init__()
        weight, bias = joined([(layer.weight, layer.bias) for layer in layers])
        values, scale = reference.quantize_rows(weight)
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.to(torch.bfloat16, copy=True))

    def forward(self, values: Tensor, scale: Tensor, units: slice = slice(None), with_bias: bool = True) -> Tensor:
        """values [..., K], scale [..., 1] -> [..., F] bfloat16, of some units only and without the bias if asked."""
        bias = self.bias[units] if with_bias and self.bias is not None else None
        return ops.linear_fp8(values, scale, self.weight[units], self.scale[units], bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Part of `.to`, `.float` and the like: the numbers go to another device, but stay what they are."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


class Fp8ViTLayer(nn.Module):
    """A block of `fastvit.modeling`, made of four products in fp8.

    What a product reads is quantised where it is made: by the LayerNorm, by the activation, and after attention. What
    comes out of it, query, key and value too, is bfloat16; the residual stream keeps the model's dtype.
    """

    gradient_checkpointing = False  # as the encoder asks of every block

    def __init__(self, layer: ViTLayer):
        super().__init__()
        attention = layer.attention.attention
        self.num_heads = attention.num_heads
        self.activation = layer.intermediate.activation
        self.layernorm_before = layer.layernorm_before
        self.layernorm_after = layer.layernorm_after
        self.query_key_value = Fp8Linear(attention.query, attention.key, attention.value)
        self.projection = Fp8Linear(layer.attention.output.dense)
        self.intermediate = Fp8Linear(layer.intermediate.dense)
        self.output = Fp8Linear(layer.output.dense)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        attention_mask: Mask = None,
        output_attentions: bool = False,
        class_token_only: bool = False,
        carry: bool = False,
    ) -> Any:
        """Arguments and results of `ViTLayer.forward`."""
        if self.training or (torch.is_grad_enabled() and hidden_states.requires_grad):
            raise InputError("model: quantised to fp8, for inference alone: call eval(), and ask for no gradients")
        residual, values, scale = normed(hidden_states, residual, self.layernorm_before)
        is_packed = isinstance(attention_mask, Packing)
        query, key, value = self.heads(values, scale, class_token_only and not is_packed)
        if isinstance(attention_mask, Tensor):
            attention_mask = attention_mask[:, :, :1] if class_token_only else attention_mask
            attention_mask = attention_mask.to(query.dtype) if attention_mask.is_floating_point() else attention_mask
        context = attend(ops.attention, query, key, value, mask=attention_mask)
        if class_token_only:
            residual = class_tokens_of(residual, attention_mask)
            context = class_tokens_of(context, attention_mask)
        branch = self.projection(*ops.quantize_rows(context))

        residual, values, scale = normed(branch, residual, self.layernorm_after)
        branch = self.feed_forward(values, scale)
        if carry:
            return branch, residual
        hidden_states = branch + residual
        if not output_attentions:
            return hidden_states
        if isinstance(attention_mask, Packing):
            pairs = zip(pictures_of(query, attention_mask), pictures_of(key, attention_mask), strict=True)
            return hidden_states, [ops.attention_probabilities(query[None], key[None])[0] for query, key in pairs]
        return hidden_states, ops.attention_probabilities(query, key, mask=attention_mask)

    def heads(self, values: Tensor, scale: Tensor, class_token_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value [B, N, heads, head_dim], the query of the class token alone where that is all."""
        if not class_token_only:
            query, key, value = self.query_key_value(values, scale).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            return query, key, value
        size = values.shape[-1]
        query = self.query_key_value(values[:, :1], scale[:, :1], slice(0, size))
        key_value = self.query_key_value(values, scale, slice(size, None))
        key, value = key_value.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return query.unflatten(-1, (self.num_heads, -1)), key, value

    def feed_forward(self, values: Tensor, scale: Tensor) -> Tensor:
        hidden = self.intermediate(values, scale, with_bias=False)  # the activation adds it, in float32
        return self.output(*ops.bias_gelu_fp8(hidden, self.intermediate.bias, self.activation))


def normed(x: Tensor, residual: Tensor | None, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(x + residual, the norm of that in e4m3, its scales), in one pass where nothing watches the norm."""
    if not is_plain(norm, LayerNorm):
        residual, y = (x, norm(x)) if residual is None else add_and_norm(x, residual, norm)
        return residual, *ops.quantize_rows(y)
    if residual is None:
        return x, *ops.layer_norm_fp8(x, norm.weight, norm.bias, norm.eps)
    return ops.add_layer_norm_fp8(x, residual, norm.weight, norm.bias, norm.eps)


# ---------------------------------------------------------------------------------------------------------------------
# int8
# ---------------------------------------------------------------------------------------------------------------------


def to_int8(model: ViTPreTrainedModel, encoders: list[ViTEncoder]) -> None:
    """Weights by torchao's int8 tensors; the blocks then call their linear layers as the modules that they are."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError("kind: 'int8' needs the package torchao, which is not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    blocks = {module for encoder in encoders for module in encoder.modules() if isinstance(module, nn.Linear)}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: module in blocks)


KINDS: dict[str, Callable[[ViTPreTrainedModel, list[ViTEncoder]], None]] = {"fp8": to_fp8, "int8": to_int8}
