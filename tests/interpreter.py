"""Mends for Triton's CPU interpreter, which the kernel tests run on where there is no GPU.

- bfloat16 values are 16 raw bits there: casting to it cuts bits off instead of rounding, and arithmetic or `tl.dot` on
  it works on the raw bits. Here casts round to nearest even as GPUs do, and so does arithmetic, through float32.
- casting float32 to float8_e4m3fn loses the carry of a mantissa that rounds up to the next power of two, does not round
  ties to even and does not know subnormal results. Here PyTorch rounds; beyond 448 the result is 448, as on a GPU.
- a loop whose bounds are known at run time only fails on Triton 3.6 with NumPy 2.4, which no longer turns an array of
  one element into an integer.
- each call of a function inside a kernel patches the whole language anew. Here that is done once a launch, which makes
  kernels that are cut into functions twice as fast to interpret.

Seen on Triton 3.6 to 3.9. Nothing here touches the compiler; on a GPU this module is not used.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN (the carry could otherwise turn it into an infinity)."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widen(handle):
    """A bfloat16 operand as float32; any other as it is."""
    if handle is not None and handle.dtype.scalar == tl.bfloat16:
        return TensorHandle(bfloat16_to_float32(handle.data), tl.float32)
    return handle


def narrow(handle):
    return TensorHandle(float32_to_bfloat16(handle.data), tl.bfloat16)


def mend_cast(cast):
    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, src, dst_type)
        src = widen(src)
        if target == tl.bfloat16:
            return narrow(src if source == tl.float32 else cast(self, src, tl.float32))
        return src if target == tl.float32 else cast(self, src, dst_type)

    return cast_impl


def mend_float8(convert):
    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar != tl.float8e4nv:
            return convert(self, src, dst_type, rounding_mode)
        values = np.ascontiguousarray(widen(src).data, dtype=np.float32)
        rounded = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    return create_fp_to_fp


def mend_dot(dot):
    def create_dot(self, a, b, d, *rest):
        return dot(self, widen(a), widen(b), d, *rest)

    return create_dot


COMPARISONS_AND_BITS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def mend_arithmetic(function):
    """binary_op and unary_op: compute in float32 and round once, as hardware without bfloat16 units does."""

    def mended(self, *operands_and_op):
        *operands, op = operands_and_op
        if operands[0].dtype.scalar != tl.bfloat16:
            return function(self, *operands, op)
        result = function(self, *map(widen, operands), op)
        return result if op in COMPARISONS_AND_BITS else narrow(result)

    return mended


def patch_once_per_launch() -> None:
    patch_lang, call = interpreter._patch_lang, GridExecutor.__call__
    patched: set[frozenset[str]] = set()  # in the launch under way: the modules that a function knows the language by

    def patch(fn):
        modules = frozenset(module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core)
        if modules in patched:
            return interpreter._LangPatchScope()  # nothing to restore
        patched.add(modules)
        return patch_lang(fn)

    def launch(self, *args, **kwargs):
        patched.clear()
        return call(self, *args, **kwargs)

    interpreter._patch_lang, GridExecutor.__call__ = patch, launch


def install() -> None:
    """Mend the interpreter of this process. `triton` must have been imported with TRITON_INTERPRET=1."""
    InterpreterBuilder.cast_impl = mend_cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = mend_float8(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = mend_dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.binary_op = mend_arithmetic(InterpreterBuilder.binary_op)
    InterpreterBuilder.unary_op = mend_arithmetic(InterpreterBuilder.unary_op)
    patch_once_per_launch()
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
