"""`fastvit.optimize` and `fastvit.restore`: attach the fused block of `fastvit.ops.block` to a model and detach it."""

from __future__ import annotations

import functools
import importlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastvit.errors import InputError
from fastvit.models import fused
from fastvit.ops import block as blocks
from fastvit.ops.block import Adapter, FusedModule

logger = logging.getLogger("fastvit")

# The modules of this package that define `ADAPTERS`.
FAMILIES = ("vit", "dinov2", "clip", "timm", "yolos", "beit", "dinov3")


@functools.cache
def load_adapters() -> dict[str, Adapter]:
    """Return the adapter of each known block class, by the class's qualified name."""
    modules = [fused, *(importlib.import_module(f"fastvit.adapters.{name}") for name in FAMILIES)]
    return {adapter.class_name: adapter for module in modules for adapter in module.ADAPTERS}


def list_families() -> list[str]:
    """List the names of the families that `optimize` supports."""
    return list(dict.fromkeys(adapter.family for adapter in load_adapters().values() if adapter not in fused.ADAPTERS))


@dataclass
class Report:
    """The result of `optimize`; `str()` of it is a summary.

    Attributes:
        replaced: name of each replaced block -> its family.
        left: name of each block that runs its own forward -> the reason.
        parameters: number of parameters in the replaced blocks.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    parameters: int = 0

    def __str__(self) -> str:
        families = [f"{format_count(count)} of {family}" for family, count in Counter(self.replaced.values()).items()]
        lines = [f"replaced: {', '.join(families) or 'nothing'} ({self.parameters:,} parameters)"]
        lines += [f"left: {format_count(count)}: {reason}" for reason, count in Counter(self.left.values()).items()]
        return "\n".join(lines)


def format_count(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


@functools.cache
def get_fused_class(original: Any) -> Any:
    """Return the subclass of a block's class whose forward is fused."""
    if original in fused.FORWARDS:
        return fused.get_fused_class(original)
    return blocks.make_fused_class(
        original, blocks.make_block_forward(load_adapters()[blocks.get_qualified_name(original)], original), rebuild
    )


def rebuild(original: Any) -> nn.Module:
    """Create an empty module of the fused class, for copies and pickles."""
    kind = get_fused_class(original)
    return kind.__new__(kind)


def optimize(model: nn.Module) -> Report:
    """Replace the forward of the blocks in `model` by fastvit's fused one, in place.

    The modules, parameters, names, state dict and hooks do not change, and the outputs are the same up to rounding. A
    block runs its own forward while one of its parts is hooked, wrapped (LoRA) or quantised, or while attention maps
    are requested; the reason is logged (logger "fastvit", INFO). `fastvit.restore(model)` undoes the replacement.
    Calling this twice is harmless. Call it before FSDP2's `fully_shard`, which also changes the classes of modules.

    Args:
        model: any module that contains blocks of a supported family.

    Returns:
        A `Report` of the blocks that were replaced and those that were not, with the reasons.

    Raises:
        InputError: if `model` has no block of a supported family; the error lists the families.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        is_done = isinstance(module, FusedModule)
        original: Any = module._fastvit_original if is_done else type(module)
        adapter = load_adapters().get(blocks.get_qualified_name(original))
        if adapter is None:
            continue
        refusal = adapter.find_refusal(module)
        if "forward" in vars(module) and not is_done:
            refusal = "its forward was replaced (a device map?)"
        reason = refusal or blocks.examine(adapter, module)[1]
        if reason is not None:
            report.left[name] = reason
        else:
            report.replaced[name] = adapter.family
            report.parameters += sum(parameter.numel() for parameter in module.parameters())
        # The other reasons may be temporary: hooks are removed, LoRA is merged.
        if not is_done and refusal is None:
            module.__class__ = get_fused_class(original)
    fused.attach(model)  # in fastvit's own models also the embeddings and the encoder
    if not (report.replaced or report.left):
        raise InputError(
            f"model: {type(model).__name__} has no block that optimize supports; it supports"
            f" {', '.join(list_families())}"
        )
    logger.info("optimize: %s", report)
    return report


def restore(model: nn.Module) -> int:
    """Restore the blocks of `model` to their own forward, exactly as before `fastvit.optimize`.

    In fastvit's own models this includes the embeddings and the encoder: the result is the plain model of
    `fastvit.models.vit`.

    Args:
        model: any module; one without optimized blocks is not changed.

    Returns:
        The number of restored blocks.

    Raises:
        InputError: if a block was wrapped after `optimize`; nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, FusedModule)}
    for name, module in found.items():
        if type(module) is not get_fused_class(module._fastvit_original) or "forward" in module.__dict__:
            raise InputError(
                f"model: {name or 'it'} was wrapped after optimize ({blocks.get_qualified_name(type(module))},"
                " or its forward was replaced); undo that before restore"
            )
    for module in found.values():
        module.__class__ = module._fastvit_original
    return sum(blocks.get_qualified_name(type(module)) in load_adapters() for module in found.values())
