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

import torch
from torch import nn

from fastvit import ops
from fastvit.errors import InputError
from fastvit.models.pretrained import ViTPreTrainedModel
from fastvit.models.vit import LayerNorm, ViTEncoder
from fastvit.ops.block import Fp8Linear, is_hooked, is_plain


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
    """Raise InputError where a part of the block is hooked, wrapped or quantised: quantising would lose that."""
    for path, module in layer.named_modules():
        if isinstance(module, Fp8Linear):
            raise InputError(f"model: expected blocks that are not quantised yet, {path} of {name} is in fp8")
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
    if must_run_here and (reason := ops.kernel_unavailable_reason("linear_fp8", "cuda", device.index, torch.float32)):
        raise InputError(f"kind: 'fp8' cannot run here: {reason}; fastvit.backend('reference') computes it slowly")
    for layer in (layer for encoder in encoders for layer in encoder.layer):
        linears = [(module, name, child) for module in layer.modules() for name, child in module.named_children()]
        for module, name, child in linears:
            if isinstance(child, nn.Linear):
                setattr(module, name, Fp8Linear(child))  # one after the other: the model is never held twice
    model.requires_grad_(False)


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
