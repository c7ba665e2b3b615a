"""Fixes for Triton's CPU interpreter, which runs the kernel tests on machines without a GPU.

- The interpreter stores bfloat16 as 16 raw bits: casts truncate, and arithmetic and `tl.dot` operate on the raw bits.
  With this fix, casts round to nearest even as on a GPU, and arithmetic is computed in float32 and rounded.
- Casting float32 to float8_e4m3fn loses the carry of a mantissa that rounds up to the next power of two, does not round
  ties to even and does not support subnormal results. With this fix, PyTorch rounds; values beyond 448 become 448, as
  on a GPU.
- Loops with bounds that are only known at run time fail on Triton 3.6 with NumPy 2.4, which no longer converts an array
  of one element to an integer.
- Each function call inside a kernel patches the whole language again. With this fix, it is patched once per launch;
  kernels that call functions are interpreted twice as fast.

Needed on Triton 3.6 to 3.9. The compiler is not changed, and on a GPU this module is not used.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even. NaN is handled separately, because the carry could turn it into an infinity."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widen(handle):
    """Convert a bfloat16 operand to float32; return any other unchanged."""
    if handle is not None and handle.dtype.scalar == tl.bfloat16:
        return TensorHandle(bfloat16_to_float32(handle.data), tl.float32)
    return handle


def narrow(handle):
    return TensorHandle(float32_to_bfloat16(handle.data), tl.bfloat16)


def fix_cast(cast):
    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, src, dst_type)
        src = widen(src)
        if target == tl.bfloat16:
            return narrow(src if source == tl.float32 else cast(self, src, tl.float32))
        return src if target == tl.float32 else cast(self, src, dst_type)

    return cast_impl


def fix_float8(convert):
    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar != tl.float8e4nv:
            return convert(self, src, dst_type, rounding_mode)
        values = np.ascontiguousarray(widen(src).data, dtype=np.float32)
        rounded = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    return create_fp_to_fp


def fix_dot(dot):
    def create_dot(self, a, b, d, *rest):
        return dot(self, widen(a), widen(b), d, *rest)

    return create_dot


COMPARISONS_AND_BITS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def fix_arithmetic(function):
    """Make binary_op and unary_op compute in float32 and round once, as hardware without bfloat16 units does."""

    def fixed(self, *operands_and_op):
        *operands, op = operands_and_op
        if operands[0].dtype.scalar != tl.bfloat16:
            return function(self, *operands, op)
        result = function(self, *map(widen, operands), op)
        return result if op in COMPARISONS_AND_BITS else narrow(result)

    return fixed


def patch_once_per_launch() -> None:
    patch_lang, call = interpreter._patch_lang, GridExecutor.__call__
    # Of the functions patched in the current launch: the modules by which their globals refer to the language.
    patched: set[frozenset[str]] = set()

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
    """Fix the interpreter of this process. `triton` must be imported with TRITON_INTERPRET=1."""
    InterpreterBuilder.cast_impl = fix_cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = fix_float8(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = fix_dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.binary_op = fix_arithmetic(InterpreterBuilder.binary_op)
    InterpreterBuilder.unary_op = fix_arithmetic(InterpreterBuilder.unary_op)
    patch_once_per_launch()
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
