"""One call of an operation, repeated with random inputs by any of its candidates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from fastvit import ops
from fastvit.ops import reference
from fastvit.ops.cases import Case
from fastvit.ops.records import MAX_CANDIDATES, OURS, PYTORCH

DEFINITION = "definition"  # `fastvit.ops.reference` in float32; not a candidate


class TensorSpec(NamedTuple):
    """A tensor's metadata. Integers and booleans (masks) keep their values, which must not change."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    value: Tensor | None = None  # of integers and booleans, on the CPU

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> TensorSpec:
        is_kept = not tensor.is_floating_point() and tensor.dtype != torch.uint8
        value = tensor.detach().cpu() if is_kept else None
        requires_grad = tensor.requires_grad and torch.is_grad_enabled()
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, requires_grad, value)

    def make_tensor(self, generator: torch.Generator) -> Tensor:
        """Normally distributed values; matrices are scaled like weights, so that no matmul overflows float16."""
        if self.value is not None:
            return self.value.to(generator.device)
        sizes = [1 if stride == 0 else size for size, stride in zip(self.shape, self.stride, strict=True)]
        tensor = torch.empty_strided(sizes, self.stride, dtype=self.dtype, device=generator.device)
        if self.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        else:
            tensor.normal_(0, sizes[-1] ** -0.5 if len(sizes) == 2 else 1.0, generator=generator)
        return tensor.expand(self.shape).requires_grad_(self.requires_grad)


class CallInputs(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: list[Tensor]  # of the outputs, in training

    def map(self, kind: type, change: Callable[[Any], Any]) -> CallInputs:
        """A copy with `change` applied to every value of this kind."""
        changed = [[change(x) if isinstance(x, kind) else x for x in group]
                   for group in (self.args, self.kwargs.values(), self.grads)]  # fmt: skip
        return CallInputs(tuple(changed[0]), dict(zip(self.kwargs, changed[1], strict=True)), changed[2])

    def widen(self, dtype: torch.dtype) -> CallInputs:
        """A copy with floating tensors cast to a wider dtype, as separate leaves."""

        def copied(x: Tensor) -> Tensor:
            return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad) if x.is_floating_point() else x

        return self.map(Tensor, copied)


@dataclass(frozen=True)
class Call:
    """A call of an operation, with the specs of its tensors and its other arguments."""

    case: Case
    specs: CallInputs

    @classmethod
    def from_arguments(cls, case: Case, args: tuple, kwargs: dict) -> Call:
        return cls(case, CallInputs(args, kwargs, []).map(Tensor, TensorSpec.from_tensor))

    def make_inputs(self, device: torch.device) -> CallInputs:
        """Random inputs, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        inputs = self.specs.map(TensorSpec, lambda spec: spec.make_tensor(generator))
        if self.case.direction == "training":
            outputs = Trial(self.case, PYTORCH, inputs).compute_outputs()
            inputs.grads.extend(torch.empty_like(x).normal_(generator=generator) for x in outputs if x.requires_grad)
        return inputs

    def compute_reference(self, inputs: CallInputs) -> list[Tensor]:
        """The definition's results in float32, or in float64 if the candidates compute in float32."""
        autocast = dict(self.case.sizes).get("autocast", self.case.dtype)
        wider = torch.float64 if autocast == "float32" else torch.float32
        sizes = tuple(item for item in self.case.sizes if item[0] != "autocast")
        return Trial(self.case._replace(sizes=sizes), DEFINITION, inputs.widen(wider))()

    def count_bytes(self) -> int:
        sizes: list[int] = []
        self.specs.map(TensorSpec, lambda spec: sizes.append(torch.Size(spec.shape).numel() * spec.dtype.itemsize))
        return sum(sizes)


def list_candidates(case: Case) -> list[str]:
    """The names of all candidates, PyTorch's first."""
    backends = [f"{PYTORCH} {name}" for name in ops.SDPA_BACKENDS] if case.operation.startswith("attention") else []
    return [PYTORCH, *backends, *(f"{OURS} {number}" for number in range(MAX_CANDIDATES))]


@dataclass(frozen=True)
class Trial:
    """One candidate of one call with its inputs. Calling it computes outputs and, in training, gradients."""

    case: Case
    candidate: str
    inputs: CallInputs

    def __call__(self) -> list[Tensor]:
        outputs = self.compute_outputs()
        if self.case.direction != "training":
            return outputs
        tensors = [x for x in (*self.inputs.args, *self.inputs.kwargs.values()) if isinstance(x, Tensor)]
        leaves = [x for x in tensors if x.requires_grad]
        differentiable_outputs = [x for x in outputs if x.requires_grad]
        grads = torch.autograd.grad(differentiable_outputs, leaves, self.inputs.grads, allow_unused=True)
        outputs = [x.detach() for x in outputs]
        return outputs + [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]

    def compute_outputs(self) -> list[Tensor]:
        args, kwargs, _ = self.inputs
        name = dict(self.case.sizes).get("autocast")
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.case.direction == "training"))
            if name:
                stack.enter_context(torch.autocast(args[0].device.type, getattr(torch, str(name))))
            provider, _, option = self.candidate.partition(" ")
            if option and provider == PYTORCH:
                stack.enter_context(sdpa_kernel(ops.SDPA_BACKENDS[option]))
            if self.candidate == DEFINITION:
                outputs = getattr(reference, self.case.operation)(*args, **kwargs)
            else:
                choice = int(option) if provider == OURS else "default"
                outputs = ops.run_implementation(choice, self.case.operation, args, kwargs)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@contextlib.contextmanager
def record_tiles() -> Iterator[dict[tuple, Any]]:
    """Context manager that records the tiles selected inside, to recognise candidates with equal tiles."""
    from fastvit.kernels import tuning as tiles

    used: dict[tuple, Any] = {}
    module: Any = tiles
    look_up = module.select

    def select(*case: Any) -> Any:
        used[case[:-1]] = look_up(*case)
        return used[case[:-1]]

    module.select = select
    try:
        yield used
    finally:
        module.select = look_up
