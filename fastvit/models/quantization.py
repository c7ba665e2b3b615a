"""Inference in 8 bits: `fastvit.quantize(model, "fp8")` and `fastvit.quantize(model, "int8")`.

    fp8    Weights and activations of the linear layers are e4m3 with one float32 scale per row; the GEMMs run on the
           fp8 tensor cores of sm_89 and newer. Half the weight memory of bfloat16 and twice its peak rate; e4m3 has 4
           significant bits.
    int8   Weight-only, with the package torchao; the GEMMs run in the model's own dtype.

The patch embedding, attention (the softmax and its two matmuls), LayerNorm and the classifier are not quantised.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from fastvit import ops
from fastvit.errors import InputError
from fastvit.models.pretrained import ViTPreTrainedModel
from fastvit.models.vit import LayerNorm, ViTEncoder
from fastvit.ops.block import Fp8Linear, is_hooked, is_plain


def quantize(model: ViTPreTrainedModel, kind: str) -> ViTPreTrainedModel:
    """Quantise the blocks of a model, in place, for inference.

    Save a quantised model with `torch.save(model.state_dict(), ...)` and load that into a quantised model of the same
    config.

    Args:
        model: one of fastvit's models, in bfloat16 or float32 for "fp8".
        kind: "fp8", for GPUs of sm_89 and newer, or "int8", which needs torchao. On a CPU, and under
            `fastvit.backend("reference")`, PyTorch computes the same values as fp8, slowly.

    Returns:
        The same model, in evaluation mode and, for "fp8", with no trainable parameters.

    Raises:
        InputError: if `kind` is unknown, the model is not one of fastvit's, a block is already quantised, wrapped
            (LoRA) or hooked, or the device or a size is not supported.
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
    """Raise InputError if a part of the block is hooked, wrapped or quantised: quantising would discard that."""
    for path, module in layer.named_modules():
        if isinstance(module, Fp8Linear):
            raise InputError(f"model: expected blocks that are not quantised, but {path} of {name} is in fp8")
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
        raise InputError(f"model: expected torch.bfloat16 or torch.float32 for fp8, got {model.dtype}; cast it")
    must_run_here = device.type == "cuda" and ops.current_backend() != "reference"
    if must_run_here and (reason := ops.kernel_unavailable_reason("linear_fp8", "cuda", device.index, torch.float32)):
        raise InputError(f"kind: 'fp8' cannot run here: {reason}; fastvit.backend('reference') computes it slowly")
    for layer in (layer for encoder in encoders for layer in encoder.layer):
        linears = [(module, name, child) for module in layer.modules() for name, child in module.named_children()]
        for module, name, child in linears:
            if isinstance(child, nn.Linear):
                setattr(module, name, Fp8Linear(child))  # one at a time: memory never holds the model twice
    model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# int8
# ---------------------------------------------------------------------------------------------------------------------


def to_int8(model: ViTPreTrainedModel, encoders: list[ViTEncoder]) -> None:
    """Replace weights by torchao's int8 tensors; the blocks then run unfused, calling their linear layers."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError("kind: 'int8' needs the package torchao, which is not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    blocks = {module for encoder in encoders for module in encoder.modules() if isinstance(module, nn.Linear)}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: module in blocks)


KINDS: dict[str, Callable[[ViTPreTrainedModel, list[ViTEncoder]], None]] = {"fp8": to_fp8, "int8": to_int8}
