"""A memory checker for Triton's CPU interpreter: it detects accesses out of bounds and races between programs.

On a GPU, a load outside all tensors may fault even if its value is masked later, and two programs that access the same
address may produce different numbers from run to run. Neither shows in the results of an interpreter.
`watch_accesses` checks each access beforehand, and raises `AccessError` if

- a load or store touches a byte outside the views passed to the launch (for a descriptor, outside its base tensor);
- a byte is stored twice in one launch, by any programs, or twice by one store;
- a byte is loaded after the launch stored it, or stored after another program loaded it;
- atomics are used, since sums would depend on the order of programs.

Masked lanes of a load without `other` are undefined on a GPU; here they are NaN. Programs run in the usual order,
reversed or shuffled.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

ORDERS = ("usual", "reversed", "shuffled")
PADDING = 256  # bytes of poison on either side of a tensor; descriptors require addresses that are multiples of 16
POISON = 0xFF  # repeated, NaN in every floating dtype and -1 in every signed integer dtype
NOBODY, SEVERAL = -1, -2


class AccessError(Exception):
    """Raised instead of an access that is invalid or a race on a GPU."""


class Memory:
    """Per byte of one storage: whether a launch may access it, and which programs stored and loaded it."""

    def __init__(self, storage: torch.UntypedStorage):
        self.begin, self.size = storage.data_ptr(), storage.nbytes()
        self.accessible = np.zeros(self.size, bool)
        self.stored_by = np.full(self.size, NOBODY, np.int32)
        self.loaded_by = np.full(self.size, NOBODY, np.int32)

    def add_view(self, tensor: Tensor) -> None:
        """Mark the elements of a view as accessible, but not the bytes between them."""
        size = tensor.element_size()
        shape = [1 if stride == 0 else length for length, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        strides = [stride * size for stride in tensor.stride()]
        given = torch.from_numpy(self.accessible)
        torch.as_strided(given, (*shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)


class Watch:
    """Checks each access. Replaces the interpreter's compiled module, to which it forwards loads and stores."""

    def __init__(self, order: str):
        self.order = order
        self.launches: Counter[str] = Counter()  # by kernel
        self._compiled = interpreter._interpreter
        self._memories: list[Memory] = []
        self._kernel, self._program = "", 0
        self._indices: Iterator[tuple[int, tuple[int, int, int]]] = iter(())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("atomic"):
            raise self._error("uses atomics")
        return getattr(self._compiled, name)

    def load(self, pointers, mask, other, dtype):
        self._check_load(pointers, mask, np.dtype(dtype).itemsize)
        return self._compiled.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self._check_store(pointers, mask, np.asarray(values).dtype.itemsize)
        return self._compiled.store(pointers, values, mask)

    def begin_launch(self, kernel: str, arguments: Iterable[Any]) -> None:
        memories: dict[int, Memory] = {}
        for tensor in _iterate_tensors(arguments):
            storage = tensor.untyped_storage()
            if tensor.numel():
                memory = memories.get(storage.data_ptr()) or Memory(storage)
                memories[storage.data_ptr()] = memory
                memory.add_view(tensor)
        self._kernel, self._memories = kernel, list(memories.values())
        self.launches[kernel] += 1

    def begin_programs(self, grid: tuple[int, int, int]) -> None:
        indices = list(enumerate(itertools.product(*map(range, grid))))
        if self.order == "reversed":
            indices.reverse()
        elif self.order == "shuffled":
            random.Random(len(indices)).shuffle(indices)
        self._indices = iter(indices)

    def next_program(self) -> tuple[int, int, int]:
        self._program, index = next(self._indices)
        return index

    def _check_load(self, pointers, mask, size: int) -> None:
        memory, offsets = self._find_memory(pointers, mask, size, "loads")
        if memory is None:
            return
        at = _expand_to_bytes(offsets, size)
        stored_by = memory.stored_by[at]
        if (stored_by != NOBODY).any():
            raise self._error(f"loads what program {stored_by.max()} stored")
        loaded_by = memory.loaded_by[at]
        memory.loaded_by[at] = np.where((loaded_by == NOBODY) | (loaded_by == self._program), self._program, SEVERAL)

    def _check_store(self, pointers, mask, size: int) -> None:
        memory, offsets = self._find_memory(pointers, mask, size, "stores")
        if memory is None:
            return
        if np.unique(offsets).size != offsets.size:
            raise self._error("stores an element twice in one store")
        at = _expand_to_bytes(offsets, size)
        stored_by, loaded_by = memory.stored_by[at], memory.loaded_by[at]
        if (stored_by != NOBODY).any():
            raise self._error(f"stores again what program {stored_by.max()} stored")
        if ((loaded_by != NOBODY) & (loaded_by != self._program)).any():
            raise self._error("stores what another program loaded")
        memory.stored_by[at] = self._program

    def _find_memory(self, pointers, mask, size: int, verb: str) -> tuple[Memory | None, np.ndarray]:
        """Return the memory that the active lanes point into, and their byte offsets in it."""
        pointers = np.asarray(pointers)
        pointers = pointers[np.broadcast_to(np.asarray(mask, bool), pointers.shape)].astype(np.int64)
        if not pointers.size:
            return None, pointers
        lowest, highest = int(pointers.min()), int(pointers.max())
        for memory in self._memories:
            if memory.begin <= lowest and highest + size <= memory.begin + memory.size:
                offsets = pointers - memory.begin
                outside = ~memory.accessible[_expand_to_bytes(offsets, size)].reshape(-1, size).all(1)
                if not outside.any():
                    return memory, offsets
                break
        raise self._error(f"{verb} outside of its tensors")

    def _error(self, text: str) -> AccessError:
        frame = sys._getframe(1)
        while frame.f_back and (
            frame.f_code.co_filename == __file__ or "triton" in Path(frame.f_code.co_filename).parts
        ):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        return AccessError(f"{self._kernel}, program {self._program}, {place}: {text}")


@contextmanager
def watch_accesses(order: str = "usual") -> Iterator[Watch]:
    """Check interpreted kernels within this context, and run their programs in one of `ORDERS`."""
    watch = Watch(order)
    call, masked_load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    set_grid_dim, set_grid_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx

    def launch(self, *args, **kwargs):
        watch.begin_launch(self.fn.__name__, [*args, *kwargs.values()])
        return call(self, *args, **kwargs)

    def begin_programs(self, *grid):
        watch.begin_programs(grid)
        set_grid_dim(self, *grid)

    def begin_program(self, *_):
        set_grid_idx(self, *watch.next_program())

    def load(self, pointers, mask, other, *rest, **named):
        if other is None and not np.all(mask.data):
            element = pointers.get_element_ty()
            other = TensorHandle(_make_undefined(pointers.data.shape, element), element)
        return masked_load(self, pointers, mask, other, *rest, **named)

    with (
        mock.patch.object(interpreter, "_interpreter", watch),
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(InterpreterBuilder, "set_grid_dim", begin_programs),
        mock.patch.object(InterpreterBuilder, "set_grid_idx", begin_program),
        mock.patch.object(InterpreterBuilder, "create_masked_load", load),
    ):
        yield watch


def surround_with_poison(tensor: Tensor) -> Tensor:
    """Copy a tensor, with its strides, into new memory with poison around and between the elements."""
    size = tensor.element_size()
    length = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    padding = PADDING // size
    memory = torch.empty(length + 2 * padding, dtype=tensor.dtype, device=tensor.device)
    memory.view(torch.uint8).fill_(POISON)
    view = torch.as_strided(memory, tensor.shape, tensor.stride(), padding)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    view[once].copy_(tensor[once])
    return view


def _make_undefined(shape: tuple[int, ...], element) -> np.ndarray:
    dtype = np.dtype(interpreter._get_np_dtype(element))
    return np.full((*shape, dtype.itemsize), POISON, np.uint8).view(dtype)[..., 0]


def _expand_to_bytes(offsets: np.ndarray, size: int) -> np.ndarray:
    return (offsets[:, None] + np.arange(size)).ravel()


def _iterate_tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple | list):
            yield from _iterate_tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument
