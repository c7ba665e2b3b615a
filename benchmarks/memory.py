"""Memory: the allocator's peak on a GPU, and everywhere the bytes that are kept for backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.benchmarks.timing import Step, run_once


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """The most memory that a call holds above what was held before it and its inputs; None on a CPU."""
    if device.type != "cuda":
        return None
    run_once(step, device)  # what is allocated once and kept, such as an optimizer's state, is not the call's
    prepared = step.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step.run(prepared)
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def bytes_kept(forward: Callable[[], object], known: Sequence[Any]) -> int:
    """Bytes that a forward pass keeps for backward, without those of the tensors that are there anyway (`known`)."""
    anyway = {leaf.untyped_storage().data_ptr() for leaf in known if isinstance(leaf, Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in anyway:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # while it lives no address is used twice
    del output
    return sum(kept.values())
