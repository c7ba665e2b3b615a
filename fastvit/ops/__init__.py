"""Dispatch between the model and its implementations: each operation once, and the choice of backend.

    auto        our Triton kernels on GPUs that support them, plain PyTorch (`fastvit.ops.reference`) elsewhere
    triton      our kernels, or an error with the reason why they cannot run
    reference   plain PyTorch everywhere

`FASTVIT_BACKEND` selects the backend for a process, `with fastvit.backend("reference"):` for a part of it. On a GPU,
`auto` follows the measurements recorded there (`fastvit.tuning`): our kernel with its fastest candidate, or PyTorch's
own operation. Without a record it uses our kernel with the first candidate of the tuning table. The choice and its
reason are logged once per operation (logger "fastvit", level INFO) and printed by `fastvit info`.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit.errors import InputError
from fastvit.kernels.checks import DTYPES
from fastvit.ops import eager, records, reference
from fastvit.ops.cases import SIZE_READERS, Case, make_case
from fastvit.ops.tracing import is_transform_active

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("fastvit")

BACKENDS = ("auto", "triton", "reference")

# Operations that have a kernel -> module of fastvit.kernels.
KERNEL_MODULES = {
    "patch_embed": "patch_embed",
    "layer_norm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "attention": "attention",
    "attention_packed": "attention",
    "layer_norm_linear": "layer_norm_linear",
    "add_layer_norm_linear": "layer_norm_linear",
    "layer_norm_gelu": "layer_norm_linear",
    "feed_forward": "feed_forward",
    "add_layer_norm_feed_forward": "feed_forward",
    "quantize_rows": "quantize",
    "layer_norm_fp8": "quantize",
    "add_layer_norm_fp8": "quantize",
    "bias_gelu_fp8": "quantize",
    "linear_fp8": "quantize",
    "swiglu": "gelu",
    "bias_gelu": "gelu",
    "layer_norm_act": "layer_norm",
}


# On a GPU without fp8, plain PyTorch is many times slower than the model that fp8 replaces: an error, not a fallback.
NO_FALLBACK = ("linear_fp8",)
_kernels: dict[str, Callable[..., Any]] = {}  # by operation; all or none, so that a compiler guards on one lookup

_backend = os.environ.get("FASTVIT_BACKEND") or "auto"
if _backend not in BACKENDS:
    raise InputError(f"FASTVIT_BACKEND: expected one of {', '.join(BACKENDS)}, got {_backend!r}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager that selects the backend of all operations in the process, for all threads.

    Args:
        name: "auto", "triton" or "reference".

    Raises:
        InputError: if the name is unknown, or for "triton" if no kernel can run here. Inside, an operation raises it
            for "triton" if its kernel does not support the tensors.
    """
    global _backend
    if name not in BACKENDS:
        raise InputError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton":
        if reason := triton_unavailable_reason():
            raise InputError(f"backend: 'triton' cannot run here: {reason}")
        import_kernels()  # so that a failing kernel is an error
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def current_backend() -> str:
    """The selected backend: "auto", "triton" or "reference"."""
    return _backend


def is_interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, for tests: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false")


def triton_unavailable_reason() -> str | None:
    """The reason why no kernel can run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (there is no build for this platform, or it was not selected)"
    if torch.cuda.is_available() or is_interpreting():
        return None
    return "there is no GPU that this PyTorch can use"


@functools.cache
def kernel_unavailable_reason(
    operation: str, device_type: str, device_index: int | None, dtype: torch.dtype
) -> str | None:
    """The reason why `operation`'s kernel does not support this device and dtype, or None. Imports the kernels."""
    if reason := triton_unavailable_reason():
        return reason
    if device_type != "cuda" and not (device_type == "cpu" and is_interpreting()):
        return f"the tensors are on {device_type!r}, kernels run on GPUs"
    if device_type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device_index)
        if major < 8:
            return f"this GPU (sm_{major}{minor}) is older than sm_80, the first whose tensor cores Triton uses"
    needs = getattr(import_kernels()[KERNEL_MODULES[operation]], "gpu_unsupported_reason", None)
    if device_type == "cuda" and needs and (reason := needs(*torch.cuda.get_device_capability(device_index))):
        return reason
    return None if dtype in DTYPES else f"the kernel has no {dtype}"


@functools.cache
def import_kernels() -> dict[str, Any]:
    """The modules of `KERNEL_MODULES`, by name."""
    modules = {module: importlib.import_module(f"fastvit.kernels.{module}") for module in KERNEL_MODULES.values()}
    _kernels.update({operation: getattr(modules[module], operation) for operation, module in KERNEL_MODULES.items()})
    operators: Any = importlib.import_module("fastvit.kernels.operators")
    operators.is_strict = lambda: _backend == "triton"
    return modules


# The results depend on the arguments alone, so a compiler may treat them as constants.
@torch.compiler.assume_constant_result
def _choose_implementation(
    operation: str,
    requested: str,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
    unsupported_reason: str | None,
    case: tuple | None,
) -> int | str:
    """The implementation: a candidate number of our kernel, or PyTorch with this SDPA backend ("default")."""
    reason = kernel_unavailable_reason(operation, device_type, device_index, dtype) or unsupported_reason
    record = _find_record(device_type, device_index, case) if reason is None else None
    if requested == "triton":
        if reason is not None:
            raise InputError(f"backend: 'triton' cannot compute {operation}: {reason}")
        return record.choice if record is not None and isinstance(record.choice, int) else 0
    if reason is not None and device_type == "cuda" and operation in NO_FALLBACK:
        raise InputError(f"{operation}: {reason}; fastvit.backend('reference') computes it slowly")
    if record is not None:
        used_records[case] = record
        return record.choice
    # The interpreter is for tests: it runs only on request.
    uses_kernel = reason is None and device_type == "cuda"
    _log_choice(operation, device_type, uses_kernel, reason)
    if uses_kernel and operation in SIZE_READERS:
        _suggest_tuning()
    return 0 if uses_kernel else "default"


used_records: dict[tuple | None, records.Record] = {}  # by case; the records that this process has used


@torch.compiler.assume_constant_result
def _has_records(device_type: str, device_index: int | None) -> bool:
    return bool(records.get_table().get(records.get_gpu_name(device_type, device_index)))


def _find_record(device_type: str, device_index: int | None, case: tuple | None) -> records.Record | None:
    if case is None:
        return None
    return records.find(Case(*case), records.get_gpu_name(device_type, device_index), KERNEL_MODULES[case[0]])


@functools.cache
def _suggest_tuning() -> None:
    logger.warning(
        "fastvit has not measured these shapes on this GPU and uses its own kernels with their first tile;"
        " `fastvit tune`, or fastvit.tuning.tune(model, batch_size=...), measures which implementation is fastest"
    )


@torch.compiler.assume_constant_result
def _log_cpu_choice(operation: str, dtype: torch.dtype) -> None:
    _log_choice(operation, "cpu", False, kernel_unavailable_reason(operation, "cpu", None, dtype))


@functools.cache
def _log_choice(operation: str, device_type: str, uses_kernel: bool, reason: str | None) -> None:
    by = "our Triton kernel" if uses_kernel else f"plain PyTorch ({reason or 'Triton only interprets here'})"
    logger.info("%s on %s is computed by %s", operation, device_type, by)


_pytorch_operations: dict[str, Callable[..., Any]] = {}  # by operation
# While `fastvit.tuning` collects a model's calls, they are passed to the collector and computed by PyTorch.
_collector: Callable[[Case, tuple, dict], None] | None = None


@contextlib.contextmanager
def intercept_calls(collector: Callable[[Case, tuple, dict], None]) -> Iterator[None]:
    """Context manager that passes each tunable call to `collector`: case, arguments, keyword arguments."""
    global _collector
    before, _collector = _collector, collector
    try:
        yield
    finally:
        _collector = before


def _make_dispatcher(
    definition: Callable[P, R],
    *,
    tensor_index: int = 0,
    unsupported: Callable[P, str | None] = lambda *args, **kwargs: None,
) -> Callable[P, R]:
    """A function that calls `definition`, from `fastvit.ops.reference`, or the kernel of the same name and signature.

    The choice is made per call, by the device and dtype of argument number `tensor_index`, by `unsupported`, which
    returns why the kernel does not support these arguments, and by the matching record.
    """
    operation = definition.__name__
    plain = _pytorch_operations[operation] = getattr(eager, operation, definition)

    @functools.wraps(definition)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        if _backend == "reference":
            return definition(*args, **kwargs)
        x: Any = args[tensor_index]
        if x.is_cpu and _backend == "auto":  # a short path: even a small model calls 70 operations per forward
            _log_cpu_choice(operation, x.dtype)
            return plain(*args, **kwargs)
        transforms = "torch.func and forward-mode derivatives need PyTorch's"
        reason = transforms if is_transform_active() else unsupported(*args, **kwargs)
        case = None
        if reason is None and (_collector is not None or _has_records(x.device.type, x.device.index)):
            case = make_case(operation, x, args, kwargs)
        if _collector is not None:
            if case is not None:
                _collector(Case(*case), args, kwargs)
            return definition(*args, **kwargs)
        choice = _choose_implementation(operation, _backend, x.device.type, x.device.index, x.dtype, reason, case)
        return run_implementation(choice, operation, args, kwargs)

    return function


# Arguments that no kernel has; `unsupported` has checked that they have their defaults.
PYTORCH_ONLY_ARGUMENTS = ("dropout_p",)


def run_implementation(choice: int | str, operation: str, args: Any, kwargs: Any) -> Any:
    """Call our kernel with candidate `choice`, or PyTorch's operation with `choice` as its SDPA backend."""
    if isinstance(choice, int):
        options = {name: value for name, value in kwargs.items() if name not in PYTORCH_ONLY_ARGUMENTS}
        number = {"candidate": choice} if choice else {}  # linear_fp8 has no candidates
        return _kernels[operation](*args, **options, **number)
    if choice == "default":
        return _pytorch_operations[operation](*args, **kwargs)
    # With the others as fallbacks: another call of the same case may have strides that this backend does not support.
    others = [backend for name, backend in SDPA_BACKENDS.items() if name != choice]
    with sdpa_kernel([SDPA_BACKENDS[choice], *others], set_priority=True):
        return _pytorch_operations[operation](*args, **kwargs)


SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def uses_kernels(x: torch.Tensor) -> bool:
    """Whether operations on tensors like `x` run our kernels, and not plain PyTorch, which fuses nothing."""
    return _backend != "reference" and (_backend == "triton" or _device_has_kernels(x.device.type))


@torch.compiler.assume_constant_result
def _device_has_kernels(device_type: str) -> bool:
    return device_type == "cuda" and _is_triton_available()


@functools.cache  # PyTorch queries the driver each time
def _is_triton_available() -> bool:
    return triton_unavailable_reason() is None


ACTIVATIONS_WITH_KERNELS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu")


def _unsupported_activation(*args: Any, activation: str | None = None, **kwargs: Any) -> str | None:
    """The activation is the last positional argument; the default is "gelu"."""
    name = activation or (args[-1] if isinstance(args[-1], str) else "gelu")
    return None if name in ACTIVATIONS_WITH_KERNELS else f"the kernel has no activation {name!r}"


def _unsupported_options(dim: int, mask: Any = None, dropout_p: float = 0.0, **kwargs: Any) -> str | None:
    if dropout_p != 0:
        return f"the kernel has no dropout, and dropout_p is {dropout_p}"
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "the kernel has no gradient of an additive mask, and mask requires one"
    return _unsupported_head_dim(dim)


def _unsupported_attention(query: Any, key: Any, value: Any, **kwargs: Any) -> str | None:
    if value.shape[-1] != query.shape[-1]:
        return f"the kernel has one head dim for queries and values, not {query.shape[-1]} and {value.shape[-1]}"
    return _unsupported_options(query.shape[-1], **kwargs)


def _unsupported_packed_attention(
    qkv: Any, *, num_heads: int | None = None, cu_seqlens: Any = None, **kwargs: Any
) -> str | None:
    is_flat = qkv.dim() == (3 if cu_seqlens is None else 2)
    dim = qkv.shape[-1] // (3 * num_heads) if is_flat and num_heads else qkv.shape[-1]
    return _unsupported_options(dim, **kwargs)


def _unsupported_head_dim(dim: int) -> str | None:
    return None if 16 <= dim <= 128 and dim % 8 == 0 else f"the kernel has no head dim {dim}: 16 to 128, multiples of 8"


# The operations, documented in `fastvit.ops.reference`.
patch_embed = _make_dispatcher(reference.patch_embed, tensor_index=1)
layer_norm = _make_dispatcher(reference.layer_norm)
add_layer_norm = _make_dispatcher(reference.add_layer_norm)
layer_norm_linear = _make_dispatcher(reference.layer_norm_linear)
add_layer_norm_linear = _make_dispatcher(reference.add_layer_norm_linear)
layer_norm_gelu = _make_dispatcher(reference.layer_norm_gelu, unsupported=_unsupported_activation)
add_layer_norm_feed_forward = _make_dispatcher(
    reference.add_layer_norm_feed_forward, unsupported=_unsupported_activation
)
attention = _make_dispatcher(reference.attention, unsupported=_unsupported_attention)
attention_packed = _make_dispatcher(reference.attention_packed, unsupported=_unsupported_packed_attention)
quantize_rows = _make_dispatcher(reference.quantize_rows)
layer_norm_fp8 = _make_dispatcher(reference.layer_norm_fp8)
add_layer_norm_fp8 = _make_dispatcher(reference.add_layer_norm_fp8)
bias_gelu_fp8 = _make_dispatcher(reference.bias_gelu_fp8, unsupported=_unsupported_activation)
linear_fp8 = _make_dispatcher(reference.linear_fp8, tensor_index=1)  # by the scales, whose float32 is in DTYPES
attention_probabilities = reference.attention_probabilities
feed_forward = _make_dispatcher(reference.feed_forward, unsupported=_unsupported_activation)
swiglu = _make_dispatcher(reference.swiglu)
bias_gelu = _make_dispatcher(reference.bias_gelu, unsupported=_unsupported_activation)
layer_norm_act = _make_dispatcher(reference.layer_norm_act, unsupported=_unsupported_activation)
join_tokens = reference.join_tokens
linear = eager.linear
normalize_pixels = reference.normalize_pixels
ACTIVATIONS = reference.ACTIVATIONS
