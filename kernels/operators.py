"""How an operation reaches PyTorch: as an operator of its dispatcher, and past it.

Compilers, exports, dispatch modes and tensor subclasses follow operators (`torch.library.custom_op`) and must see one.
Everybody else only wants the result: there a call goes straight to the launch, because the dispatcher's way through
Python takes longer than a small kernel does on a GPU (`benchmarks/NOTES.md` has the numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef

from fastvit.watchers import is_watched


def wants_operators(values: Sequence[Any]) -> bool:
    """Whether somebody follows operations on these, some of which are tensors, and so must be shown operators."""
    if is_watched() or torch._C._len_torch_dispatch_stack():
        return True
    for value in values:
        kind = type(value)
        if not (kind is Tensor or kind is nn.Parameter) and isinstance(value, Tensor):  # fake, sharded, quantised, ...
            return True
    return False


class Operator:
    """An operator `fastvit::name`. Called like the function that computes it, with positional arguments."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.function = function
        self.definition: CustomOpDef = torch.library.custom_op(f"fastvit::{name}", function, mutates_args=())
        self.differentiable: Callable[..., Any] = self.definition  # without derivatives: its error says so
        self.register_fake = self.definition.register_fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As torch.library's: backward(ctx, *grads), and setup_context(ctx, inputs, output)."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        compute = self.function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):  # with a setup_context of its own PyTorch would read a signature at each call
                output = compute(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx, *grads):
                return backward(ctx, *grads)

        self.differentiable = Differentiable.apply

    def __call__(self, *inputs: Any) -> Any:
        if is_watched() or torch._C._len_torch_dispatch_stack():
            return self.definition(*inputs)
        compute = self.function
        records = torch.is_grad_enabled()
        for value in inputs:
            kind = type(value)
            if kind is Tensor or kind is nn.Parameter:
                if records and value.requires_grad:
                    compute = self.differentiable
            elif isinstance(value, Tensor):  # fake, sharded, quantised, ...
                return self.definition(*inputs)
        return compute(*inputs)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of the function that launches its kernels; its annotations are the operator's schema."""
    return lambda function: Operator(name, function)
