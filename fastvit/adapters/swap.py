"""`fastvit.optimize` and `fastvit.restore`: the fused block of `fastvit.ops.block`, attached and taken off again."""

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

# The modules beside this one that have `ADAPTERS`.
FAMILIES = ("vit", "dinov2", "clip", "timm", "yolos", "beit", "dinov3")


@functools.cache
def load_adapters() -> dict[str, Adapter]:
    """Class of a block -> its adapter."""
    modules = [fused, *(importlib.import_module(f"fastvit.adapters.{name}") for name in FAMILIES)]
    return {adapter.class_name: adapter for module in modules for adapter in module.ADAPTERS}


def list_families() -> list[str]:
    """The names of the families that `optimize` knows."""
    return list(dict.fromkeys(adapter.family for adapter in load_adapters().values() if adapter not in fused.ADAPTERS))


@dataclass
class Report:
    """What `optimize` did to a model: names of blocks."""

    replaced: dict[str, str] = field(default_factory=dict)  # -> family
    left: dict[str, str] = field(default_factory=dict)  # -> why it computes itself
    parameters: int = 0  # how many numbers the replaced blocks hold

    def __str__(self) -> str:
        families = [f"{format_count(count)} of {family}" for family, count in Counter(self.replaced.values()).items()]
        lines = [f"replaced: {', '.join(families) or 'nothing'} ({self.parameters:,} parameters)"]
        lines += [f"left: {format_count(count)}: {reason}" for reason, count in Counter(self.left.values()).items()]
        return "\n".join(lines)


def format_count(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


@functools.cache
def get_fused_class(original: Any) -> Any:
    """The subclass of a block's class that has the fused forward."""
    if original in fused.FORWARDS:
        return fused.get_fused_class(original)
    return blocks.make_fused_class(
        original, blocks.make_block_forward(load_adapters()[blocks.get_qualified_name(original)], original), rebuild
    )


def rebuild(original: Any) -> nn.Module:
    """An empty module of the fused class, for copies and pickles."""
    kind = get_fused_class(original)
    return kind.__new__(kind)


def optimize(model: nn.Module) -> Report:
    """Let our operations compute the blocks of `model`, in place; `fastvit.restore(model)` undoes it.

    The model keeps its modules, parameters, names, state dict and hooks, and computes the same. A block whose parts are
    watched by hooks, wrapped (LoRA), quantised or asked for attention maps computes itself, for as long as that holds;
    why is in what is returned and in the log (logger "fastvit", INFO). May be called twice. Optimize before FSDP2's
    `fully_shard`, which changes classes too.

    Raises InputError for a model without a block of a family that is known; the error lists them.
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
        # Other reasons may go away: hooks are removed, LoRA is merged.
        if not is_done and refusal is None:
            module.__class__ = get_fused_class(original)
    fused.attach(model)  # of our own models also the embeddings and the encoder
    if not (report.replaced or report.left):
        raise InputError(
            f"model: {type(model).__name__} has no block that optimize knows; it knows those of"
            f" {', '.join(list_families())}"
        )
    logger.info("optimize: %s", report)
    return report


def restore(model: nn.Module) -> int:
    """Give the blocks of `model` their own forward back, exactly as before `fastvit.optimize`; returns how many.

    Of fastvit's own models the embeddings and the encoder too: what is left is the plain model of `fastvit.models.vit`.

    Raises InputError, before it changes anything, if something has wrapped a block since: that has to go first.
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
