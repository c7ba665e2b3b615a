"""Parameters that lie one after the other in memory: one tensor without a copy.

Query, key and value are three weights in a checkpoint and one matrix product in a fast model. Where autograd must cut
the gradient of their concatenation apart, that is made anew at each step. Elsewhere it is a view: in inference, of
frozen weights, and in an operation that computes the gradients itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvit.watchers import is_watched, recorded

if TYPE_CHECKING:
    from fastvit.reference import Affine


def lay_side_by_side(tensors: Sequence[Tensor]) -> None:
    """Move parameters of one shape so that they lie in one piece of memory; nothing else of them changes.

    They stay where they are if they have no memory of their own (meta, fake or sharded tensors), share it with other
    processes, or differ in shape, dtype or device.
    """
    first = tensors[0]
    like_first = [
        type(tensor) is nn.Parameter
        and (tensor.shape, tensor.dtype, tensor.device) == (first.shape, first.dtype, first.device)
        and (tensor.is_cuda or (tensor.is_cpu and not tensor.is_shared()))
        for tensor in tensors
    ]
    if all(like_first) and not (lie_side_by_side(tensors) or torch.is_inference_mode_enabled()):
        parts = torch.cat([tensor.detach() for tensor in tensors]).chunk(len(tensors))
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.data = part


def lie_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether these are parameters that fill one piece of memory, one after the other."""
    first, end = tensors[0], 0
    for tensor in tensors:
        if type(tensor) is not nn.Parameter or tensor.dtype is not first.dtype or not tensor.is_contiguous():
            return False
        if tensor.data_ptr() != (end or first.data_ptr()):
            return False
        end = tensor.data_ptr() + tensor.nbytes
    storage = first.untyped_storage()  # neighbours by chance have one each
    return end <= storage.data_ptr() + storage.nbytes()


def joined(projections: Sequence[Affine]) -> Affine:
    """Weight and bias of one linear layer that computes all of these."""
    if together := joined_in_memory(projections):
        return together
    weights, biases = zip(*projections, strict=True)
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def joined_in_memory(projections: Sequence[Affine]) -> Affine | None:
    """`joined` without a copy, where that can be: of tensors that lie side by side and get no gradient."""
    weights, biases = zip(*projections, strict=True)
    weight = as_one(weights)
    if weight is None or biases[0] is None:
        return None if weight is None else (weight, None)
    bias = as_one(biases)
    return None if bias is None else (weight, bias)


def as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """torch.cat(tensors) of one shape without a copy, or None where that cannot be: they must lie side by side, and no
    gradient of theirs be recorded."""
    if recorded(*tensors) or is_watched() or not lie_side_by_side(tensors):
        return None
    first = tensors[0].detach()  # else a later change of the parameter would make the view require a gradient
    rows, *rest = first.shape
    return first.as_strided((len(tensors) * rows, *rest), first.stride())
