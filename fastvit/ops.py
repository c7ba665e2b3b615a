"""The one seam between the model and what computes it: each operation once, and the choice of who computes it.

    auto        our Triton kernels on a GPU that they run on, plain PyTorch (`fastvit.reference`) anywhere else
    triton      our kernels, or an error that says why they cannot run
    reference   plain PyTorch everywhere

`FASTVIT_BACKEND` says which when the program starts, `with fastvit.backend("reference"):` for a part of it. What `auto`
chose and why is logged once for each operation (logger "fastvit", level INFO) and printed by `fastvit info`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from fastvit import reference
from fastvit.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("fastvit")

BACKENDS = ("auto", "triton", "reference")

# Operations that have a kernel -> module of fastvit.kernels.
KERNELS = {
    "patch_embed": "patch_embed",
    "layer_norm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "layer_norm_linear": "layer_norm_gelu",
    "add_layer_norm_linear": "layer_norm_gelu",
    "feed_forward": "feed_forward",
    "add_layer_norm_feed_forward": "feed_forward",
    "quantize_rows": "quantize",
    "layer_norm_fp8": "quantize",
    "add_layer_norm_fp8": "quantize",
    "bias_gelu_fp8": "quantize",
    "linear_fp8": "quantize",
}
# On a GPU that lacks it, plain PyTorch is many times slower than what fp8 is to replace: an error, not a fallback.
NO_FALLBACK = ("linear_fp8",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what every kernel takes
_kernels: dict[str, Callable[..., Any]] = {}  # their functions, once imported

_backend = os.environ.get("FASTVIT_BACKEND") or "auto"
if _backend not in BACKENDS:
    raise InputError(f"FASTVIT_BACKEND: expected one of {', '.join(BACKENDS)}, got {_backend!r}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, operations are computed by "triton", "reference" or, as usual, "auto": whichever fits the device.

    It holds for the whole process, all threads. Raises InputError for another name, or for "triton" where no kernel can
    run at all; an operation raises it for "triton" where its kernel cannot run on the tensors that it is given.
    """
    global _backend
    if name not in BACKENDS:
        raise InputError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and (reason := why_not_triton_anywhere()):
        raise InputError(f"backend: 'triton' cannot run here: {reason}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def current_backend() -> str:
    """What was asked for: "auto", "triton" or "reference"."""
    return _backend


def is_interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, step by step, to test them: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false")


def why_not_triton_anywhere() -> str | None:
    """Why no kernel can run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it has no build for this platform, or was left out)"
    if torch.cuda.is_available() or is_interpreting():
        return None
    return "there is no GPU that this PyTorch can use"


@functools.cache
def why_not_triton(
    operation: str, device_type: str, device_index: int | None, dtype: torch.dtype, variant: Any = None
) -> str | None:
    """Why the kernel of `operation` cannot run on tensors of this device and dtype, or None. Imports the kernel.

    variant: what the kernel may not have, where that is neither device nor dtype: an activation, a head dim.
    """
    if reason := why_not_triton_anywhere():
        return reason
    if device_type != "cuda" and not (device_type == "cpu" and is_interpreting()):
        return f"the tensors are on {device_type!r}, kernels run on GPUs"
    if device_type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device_index)
        if major < 8 and dtype == torch.bfloat16:
            return f"this GPU (sm_{major}{minor}) has no bfloat16; use float16"
        if (major, minor) < (7, 5):
            return f"this GPU (sm_{major}{minor}) is older than sm_75, the oldest that Triton compiles for"
    module = importlib.import_module(f"fastvit.kernels.{KERNELS[operation]}")
    _kernels[operation] = getattr(module, operation)
    needs = getattr(module, "why_not_on", None)
    if device_type == "cuda" and needs and (reason := needs(*torch.cuda.get_device_capability(device_index))):
        return reason
    if dtype not in DTYPES:
        return f"the kernel has no {dtype}"
    return None if variant is None else module.why_not(variant)


# A compiler that traces an operation takes the answer as a constant; it depends on nothing that it has not asked about.
@torch.compiler.assume_constant_result
def _runs_on_triton(
    operation: str, asked: str, device_type: str, device_index: int | None, dtype: torch.dtype, variant: Any
) -> bool:
    reason = why_not_triton(operation, device_type, device_index, dtype, variant)
    if asked == "triton":
        if reason is not None:
            raise InputError(f"backend: 'triton' cannot compute {operation}: {reason}")
        return True
    if reason is not None and device_type == "cuda" and operation in NO_FALLBACK:
        raise InputError(f"{operation}: {reason}; fastvit.backend('reference') computes it slowly")
    # The interpreter proves kernels; it is no way to compute anything unless asked for.
    chosen = reason is None and device_type == "cuda"
    _announce(operation, device_type, chosen, reason)
    return chosen


@functools.cache
def _announce(operation: str, device_type: str, chosen: bool, reason: str | None) -> None:
    by = "our Triton kernel" if chosen else f"plain PyTorch ({reason or 'Triton only interprets here'})"
    logger.info("%s on %s is computed by %s", operation, device_type, by)


def _chosen(definition: Callable[P, R], *, like: int = 0, variant: Callable[P, Any] | None = None) -> Callable[P, R]:
    """`definition`, a function of `fastvit.reference`, or its kernel of the same name and signature.

    Which is decided at each call by the device and dtype of the tensor that is argument number `like`, and by what
    `variant` says of the arguments (see `why_not_triton`).
    """
    operation = definition.__name__

    @functools.wraps(definition)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        if _backend != "reference":
            x: Any = args[like]
            asked_for = None if variant is None else variant(*args, **kwargs)
            if _runs_on_triton(operation, _backend, x.device.type, x.device.index, x.dtype, asked_for):
                return _kernels[operation](*args, **kwargs)
        return definition(*args, **kwargs)

    return function


def _last(*args: Any, **kwargs: Any) -> Any:
    return args[-1]


# The operations; each is documented where it is defined.
patch_embed = _chosen(reference.patch_embed, like=1)
layer_norm = _chosen(reference.layer_norm)
add_layer_norm = _chosen(reference.add_layer_norm)
layer_norm_linear = _chosen(reference.layer_norm_linear)
add_layer_norm_linear = _chosen(reference.add_layer_norm_linear)
add_layer_norm_feed_forward = _chosen(reference.add_layer_norm_feed_forward, variant=_last)  # the activation
quantize_rows = _chosen(reference.quantize_rows)
layer_norm_fp8 = _chosen(reference.layer_norm_fp8)
add_layer_norm_fp8 = _chosen(reference.add_layer_norm_fp8)
bias_gelu_fp8 = _chosen(reference.bias_gelu_fp8, variant=_last)  # the activation
linear_fp8 = _chosen(reference.linear_fp8, like=1)  # the scales, which are float32 as every kernel takes
attention = reference.attention
attention_packed = reference.attention_packed
attention_probabilities = reference.attention_probabilities
feed_forward = _chosen(reference.feed_forward, variant=_last)  # the activation
join_tokens = reference.join_tokens
normalize_pixels = reference.normalize_pixels
ACTIVATIONS = reference.ACTIVATIONS
