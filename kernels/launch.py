"""How a kernel is launched: Triton's `kernel[grid](...)`, remembered.

Triton looks at every argument of every launch to find the binary that was compiled for its like, which takes the host
longer than a small kernel takes the GPU (`benchmarks/NOTES.md` has the numbers). A launch with the same numbers, dtypes
and alignment as an earlier one takes the binary that it got.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 4096  # launches to remember: batches of pictures of different sizes bring ever new numbers

_remembered: dict[tuple, tuple[Any, tuple]] = {}  # a compiled kernel, and the last of its arguments


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float] = (),
    named: Mapping[str, Any] = {},
) -> None:
    """kernel[grid](*tensors, *numbers, **named) on the device of the first tensor, which is not None.

    named: what follows in the kernel's signature, and compile options such as num_warps; no tensors.
    """
    device = tensors[0].device  # type: ignore[union-attr]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, named)
        return
    key: list[Any] = [id(kernel), device]
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        else:
            key.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    # A kernel is compiled for addresses that are multiples of 16, or for any. On AMD's GPUs sizes of memory count too.
    remembers = addresses % 16 == 0 and torch.version.hip is None
    if remembers:
        key += numbers
        key += named
        key += named.values()
        if found := _remembered.get(tuple(key)):
            compiled, rest = found
            compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *rest)
            return
    compiled = kernel[grid](*tensors, *numbers, **named)
    if remembers and compiled is not None:  # the interpreter compiles nothing
        if len(_remembered) >= MOST:
            _remembered.clear()
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _remembered[tuple(key)] = compiled, tuple(named[name] for name in names)
