"""Registration of launchers as PyTorch operators, with a fallback for kernels that fail.

`@register("attention", fallback=...)` registers the decorated launcher as `fastvit::attention` with
`torch.library.custom_op`, which eager mode, autograd, `torch.compile`, export and dispatch modes all call. For fake
tensors the launcher returns once the outputs are allocated (`is_fake`).

The fallback is plain PyTorch with the launcher's signature. On a GPU, under backend "auto", a launch that fails for any
reason but out of memory (Triton cannot compile it, or ptxas or the driver rejects it) is logged once, and from then on
the fallback runs for calls of the same dtypes, last dimensions and options. Under backend "triton", and wherever
kernels are interpreted, the exception propagates: a test must never pass on a fallback.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger("fastvit")

FALLBACK_DEVICES = ("cuda",)  # on other devices kernels are interpreted, for tests


class Failure(NamedTuple):
    """A kernel that could not be compiled or launched, and the inputs it was called with."""

    operator: str
    inputs: str
    error: str
    versions: str


failures: dict[tuple, Failure] = {}  # by operator and kind of call; read by `fastvit info` and the run report


def is_strict() -> bool:
    """Whether a failing kernel is an error. `fastvit.ops` replaces this function: it is one under backend "triton"."""
    return False


def register(name: str, *, fallback: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register the decorated launcher as the operator `fastvit::<name>`; its annotations are the operator's schema.

    fallback: plain PyTorch with the launcher's signature and results.
    """

    def decorate(launcher: Callable[..., Any]) -> CustomOpDef:
        parameters = tuple(inspect.signature(launcher).parameters)

        @functools.wraps(launcher)
        def guarded(*args: Any) -> Any:
            device = next(arg.device for arg in args if isinstance(arg, Tensor))
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):  # Triton launches on the current device
                    return guarded(*args)
            if device.type not in FALLBACK_DEVICES or is_strict():
                return launcher(*args)
            case = (name, device, *map(_describe_argument, parameters, args))
            if case not in failures:
                try:
                    return launcher(*args)
                except Exception as error:
                    if _is_out_of_memory(error):
                        raise
                    failures[case] = _describe_failure(name, args, error)
                    logger.warning("kernel %s failed on %s, PyTorch computes it from now on: %s (%s)", *failures[case])
            return fallback(*args)

        schema = torch.library.infer_schema(launcher, mutates_args=())
        registered = torch.library.custom_op(f"fastvit::{name}", guarded, mutates_args=(), schema=schema)
        registered.register_fake(launcher)
        return registered

    return decorate


def is_fake(tensor: Tensor) -> bool:
    """Whether only shapes are computed, for a compiler or an export. "meta" tensors are launched: tests record them."""
    return isinstance(tensor, FakeTensor)


def select_gradients(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """One gradient per input: None where none is needed, and for the inputs after the last of `grads`."""
    padded = (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))
    return tuple(grad if needs else None for grad, needs in zip(padded, ctx.needs_input_grad, strict=True))


def _describe_argument(name: str, value: Any) -> Any:
    """The part of an argument that decides which binary is compiled: neither the number of rows nor the image size."""
    if name == "max_seqlen":
        return None
    if isinstance(value, Tensor):
        return value.dtype, value.shape[-1] if value.ndim and name != "pixels" else 0
    return tuple(value) if isinstance(value, list) else value


def _is_out_of_memory(error: Exception) -> bool:
    """Out of memory in PyTorch, Python, the driver or cuBLAS. Triton's OutOfResources concerns a multiprocessor's."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text or "alloc_failed" in text


def _describe_failure(name: str, args: tuple[Any, ...], error: BaseException) -> Failure:
    inputs = ", ".join(f"{str(arg.dtype)[6:]} {list(arg.shape)}" for arg in args if isinstance(arg, Tensor))
    while error.__cause__ is not None:  # a compilation error wraps its reason
        error = error.__cause__
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return Failure(name, inputs, text, f"torch {torch.__version__}, triton {triton.__version__}")
