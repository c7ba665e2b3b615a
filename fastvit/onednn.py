"""Matrix products on x86 processors by oneDNN.

In float32 PyTorch takes MKL's product, which needed about twice as long on one AMD EPYC with AVX-512 and 1.0 to 1.7
times as long on another; on Intel's nobody compared them. The product is oneDNN's float32 one, no lower precision: its
error against float64 is within 1.5 times MKL's. In bfloat16 PyTorch takes oneDNN too, but with GELU and bias as passes
of their own, and under autocast with weights that are rounded into new memory at each step.
`torch.backends.mkldnn.flags(enabled=False)` turns all of it off.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastvit.watchers import is_watched, recorded


@functools.cache
def is_there() -> bool:
    """Whether this PyTorch has the product, for a processor on which it is worth taking."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, but not in tiles (AMX): those serve PyTorch's own attention well."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


GELU_FORMS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # of activations, in torch's words

PLAIN = (Tensor, nn.Parameter)
FEWEST_WEIGHTS, FEWEST_PRODUCTS = 2**18, 2**24  # either is enough


def can_take(x: Tensor, weight: Tensor) -> bool:
    """Whether these are plain tensors on a CPU that has the products, and nobody watches; shapes that do not fit are
    left to PyTorch, which says so."""
    return (
        not is_watched()
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and x.is_cpu
        and x.numel() > 0
        and x.shape[-1] == weight.shape[-1]
        and torch._C._get_mkldnn_enabled()  # what torch.backends.mkldnn.enabled reads, four times as fast
        and is_there()
    )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these tensors is oneDNN's: float32 of some size, for which a call takes longer than MKL's,
    or bfloat16 when no gradient is recorded."""
    dtype = x.dtype
    if dtype is not weight.dtype or torch.is_autocast_enabled("cpu") or not can_take(x, weight):
        return False
    if dtype is torch.float32:
        return weight.numel() >= FEWEST_WEIGHTS or x.numel() * len(weight) >= FEWEST_PRODUCTS
    return dtype is torch.bfloat16 and not torch.is_grad_enabled() and has_bfloat16()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias and its gradients, as torch.nn.functional.linear's; by oneDNN for what it `takes`."""
    if rounds(x, weight):
        return rounded_linear(x, None, weight, bias)
    if not takes(x, weight):
        return F.linear(x, weight, bias)
    if recorded(x, weight, bias):
        return Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def linears(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Tensor]:
    """`linear` of x by each of these weights and biases: one product where autocast rounds them."""
    weights, biases = zip(*layers, strict=True)
    alike = len({bias is None for bias in biases}) == 1
    if not (alike and all(rounds(x, weight) for weight in weights)):
        return [linear(x, *layer) for layer in layers]
    return rounded_linear(x, None, *weights, *biases).split([len(weight) for weight in weights], dim=-1)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """x @ weight^T + bias, then GELU in the form `gelu` ("none" or "tanh", as torch calls them). Not differentiable."""
    activation, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


class Linear(torch.autograd.Function):
    """`linear` with all three products by oneDNN."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # setup_context would take 40 us a call
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def turn_off_after(error: BaseException) -> None:
    """Where oneDNN found no memory for the code of a product: PyTorch's other products from now on, with a warning.

    The error flag of its assembler is a thread's own and nothing clears it: in that thread each product of a new shape
    would fail, however much memory there is by then.
    """
    if str(error) == "could not create a primitive" and torch.backends.mkldnn.enabled:
        torch.backends.mkldnn.set_flags(False)
        warnings.warn("oneDNN is off from now on: it goes on failing after it once lacked memory", stacklevel=2)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast: float32 weights that are rounded to bfloat16 for each product
# ---------------------------------------------------------------------------------------------------------------------

FEWEST_TO_ROUND = 2**14  # weights of a layer


def rounds(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast has this weight rounded to bfloat16, for a product that is oneDNN's."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and weight.dtype is torch.float32
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.numel() >= FEWEST_TO_ROUND
        and can_take(x, weight)
        and has_bfloat16()
    )


class Layer(NamedTuple):
    """Room for linear layers side by side in bfloat16."""

    weight: Tensor  # [units of all, D]
    bias: Tensor | None  # [units of all]
    targets: list[Tensor]  # parts of both, one for each tensor of the layers
    shapes: list[torch.Size | None]

    def round(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with these numbers: all weights of the layers, then all biases."""
        torch._foreach_copy_(self.targets, [tensor for tensor in tensors if tensor is not None])
        return self.weight, self.bias


def shapes_of(tensors: Sequence[Tensor | None]) -> list[torch.Size | None]:
    return [None if tensor is None else tensor.shape for tensor in tensors]


def room_for(tensors: Sequence[Tensor | None]) -> Layer:
    """For these: all weights [units, D], then all biases [units], or a None for each."""
    weights, biases = in_halves(tensors)
    units = [len(weight) for weight in weights]
    weight = torch.empty(sum(units), weights[0].shape[1], dtype=torch.bfloat16)
    bias = None if biases[0] is None else weight.new_empty(len(weight))
    # `.data`: autograd would take the next rounding for a change of what it saved for an earlier step.
    targets = [*weight.data.split(units), *(() if bias is None else bias.data.split(units))]
    return Layer(weight, bias, targets, shapes_of(tensors))


class Rounded:
    """Room for weights in bfloat16, kept from one step to the next: touching new memory takes longer than rounding.

    While no step uses it, it belongs to the first of its weights, and goes when that does.
    """

    def __init__(self) -> None:
        self.free = WeakTensorKeyDictionary()

    def lend(self, ctx: Any, groups: Sequence[Sequence[Any]]) -> Sequence[Layer]:
        """Room in which the node `ctx` is to round these layers, each group side by side."""
        ctx.groups, ctx.versions = groups, versions_of(groups)
        layers = self.free.pop(groups[0][0], None)
        if layers is None or [layer.shapes for layer in layers] != [shapes_of(group) for group in groups]:
            layers = [room_for(group) for group in groups]
        ctx.layers = layers
        return layers

    def take_back(self, ctx: Any) -> None:
        """Where the node's backward pass needs it no more."""
        if ctx.layers is not None:
            self.free[ctx.groups[0][0]] = ctx.layers
            ctx.layers = None

    def check(self, ctx: Any) -> None:
        """Before the weights are rounded again: what was taken back may be another step's by now."""
        if ctx.versions != versions_of(ctx.groups):
            raise RuntimeError("a weight was modified by an inplace operation, and is needed for another gradient")


def versions_of(groups: Sequence[Sequence[Any]]) -> list[int]:
    return [weight._version for group in groups for weight in in_halves(group)[0]]


rounded = Rounded()


class Scratch(threading.local):
    """Each thread's memory for weights in bfloat16 that are needed but a moment."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.bfloat16)
        self.layers: dict[tuple[torch.Size | None, ...], Layer] = {}

    def of(self, rows: int, columns: int) -> Tensor:
        """[rows, columns]"""
        if len(self.memory) < rows * columns:
            self.memory = torch.empty(rows * columns, dtype=torch.bfloat16)
        return self.memory[: rows * columns].view(rows, columns)

    def round(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of these layers side by side: all their weights, then all biases."""
        shapes = tuple(shapes_of(tensors))
        layer = self.layers.get(shapes)
        if layer is None:
            if len(self.layers) >= 8:  # a block has four, its pieces one more
                self.layers.clear()
            with torch.inference_mode(False):
                layer = self.layers[shapes] = room_for(tensors)
        return layer.round(tensors)


scratch = Scratch()


def rounded_linear(x: Tensor, gelu: str | None, *weights_and_biases: Tensor | None) -> Tensor:
    """gelu(x) @ weight^T + bias of some float32 layers side by side, as autocast rounds them, and first derivatives.

    x: [..., D]; gelu: its form, or None to leave it out. All weights [units, D] come before all biases [units], or a
    None for each. Returns [..., units of all] in bfloat16.
    """
    x = x.to(torch.bfloat16)
    if recorded(x, *weights_and_biases):
        return RoundedLinear.apply(x, gelu, *weights_and_biases)
    return product(activated(x, gelu), *scratch.round(weights_and_biases))


def in_halves(both: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return both[: len(both) // 2], both[len(both) // 2 :]


def activated(x: Tensor, gelu: str | None) -> Tensor:
    return x if gelu is None else F.gelu(x, approximate=gelu)


def grads_of_weights(grad: Tensor, x: Tensor, units: Sequence[int], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Float32 gradients of weights [units, D] side by side, from those of their product with x; None if not wanted.

    grad: [rows, units of all]; x: [rows, D]; bfloat16.
    """
    if not any(wanted):
        return [None] * len(units)
    parts = torch.mm(grad.t(), x, out=scratch.of(grad.shape[1], x.shape[1])).split(list(units))
    return [part.float() if is_wanted else None for part, is_wanted in zip(parts, wanted, strict=True)]


def grads_of_biases(grad: Tensor, units: Sequence[int], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    """Likewise of biases [units]."""
    return grad.sum(0).float().split(list(units)) if any(wanted) else [None] * len(units)


class RoundedLinear(torch.autograd.Function):
    """`rounded_linear` with derivatives; gelu(x) is computed again in backward, not kept.

    Like autocast's own, its gradients are those of the weights that forward saw, whatever became of them since.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gelu: str | None, *weights_and_biases: Tensor | None) -> Tensor:
        (layer,) = rounded.lend(ctx, [weights_and_biases])
        weight, bias = layer.round(weights_and_biases)
        ctx.gelu = gelu
        ctx.save_for_backward(x, weight)
        return product(activated(x, gelu), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        (weights, _), gelu = in_halves(ctx.groups[0]), ctx.gelu
        needs_x, _, *needs = ctx.needs_input_grad
        needs_weights, needs_biases = in_halves(needs)
        units = [len(weight) for weight in weights]
        rows = grad.flatten(0, -2)
        grad_biases = grads_of_biases(rows, units, needs_biases)
        if ctx.layers is None or torch.is_grad_enabled():  # a second backward pass, or a gradient of this gradient
            rounded.check(ctx)
            weight = torch.cat([part.to(torch.bfloat16) for part in weights])
        if torch.is_grad_enabled():
            wanted = [tensor for tensor in (x, *weights) if tensor.requires_grad]
            found = iter(torch.autograd.grad(F.linear(activated(x, gelu), weight), wanted, grad, create_graph=True))
            grad_x, *grads = (next(found) if tensor.requires_grad else None for tensor in (x, *weights))
            return grad_x, None, *grads, *grad_biases

        grad_x = torch.mm(rows, weight).view(x.shape) if needs_x else None
        if grad_x is not None and gelu is not None:
            torch.ops.aten.gelu_backward.grad_input(grad_x, x, approximate=gelu, grad_input=grad_x)
        rounded.take_back(ctx)
        grad_weights = grads_of_weights(rows, activated(x, gelu).flatten(0, -2), units, needs_weights)
        return grad_x, None, *grad_weights, *grad_biases
