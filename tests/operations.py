"""Shared by the tests of kernels: random inputs, results by name, comparisons, and variants of the matmul kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from accuracy import assert_no_worse_than, poison_memory
from torch import Tensor

from fastvit.kernels import tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6

# The implementations between which the tuning table chooses, with tiles so small that small inputs fill several.
TILE = {"rows": 32, "columns": 64, "depth": 32, "num_warps": 4, "num_stages": 2}
VARIANTS = {
    "separate": {"fused": 0},
    "fused": {"fused": 1, **TILE},
    "persistent": {"fused": 1, "persistent": 2, **TILE},
}


@contextmanager
def use_variants(*names: str) -> Iterator[None]:
    """Within this context, these are the candidates of every matmul operation; the first one is the default."""
    candidates = tuple(VARIANTS[name] for name in names)
    table = tuple(
        rule._replace(candidates=candidates) if "fused" in rule.candidates[0] else rule for rule in tuning.TABLE
    )
    with mock.patch.object(tuning, "TABLE", table):
        yield


def randn(*shape: int, dtype=torch.float32, seed=0, scale=1.0, shift=0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale + shift).to(DEVICE, dtype)


def compute_results(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor | None],
    *,
    cast: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    grads_for: tuple[str, ...] | None = None,
    unused: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """Return outputs and gradients by name, for random output gradients.

    Args:
        function: Accepts the inputs by name.
        inputs: Tensors by name.
        cast: Applied to each input.
        grads_for: Names of the inputs whose gradients are computed; all by default.
        unused: Indices of outputs that do not contribute to the gradients.
    """
    grads_for = tuple(name for name, tensor in inputs.items() if tensor is not None) if grads_for is None else grads_for
    given = {
        name: None if tensor is None else cast(tensor).detach().requires_grad_(name in grads_for)
        for name, tensor in inputs.items()
    }
    outputs = function(**given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    used = [output for index, output in enumerate(outputs) if index not in unused]
    if grads_for:
        grads = [randn(*output.shape, dtype=inputs["x"].dtype, seed=77).to(output.dtype) for output in used]
        found = torch.autograd.grad(used, [given[name] for name in grads_for], grads, allow_unused=True)
        named |= {f"grad {name}": grad for name, grad in zip(grads_for, found, strict=True) if grad is not None}
    return named


def check(
    ours: Callable, theirs: Callable, inputs: Mapping[str, Tensor | None], *, slack: float = 1.25, **options
) -> None:
    """Assert that outputs and gradients of `ours` are as close to float64 as those of `theirs` in the inputs' dtypes.

    Args:
        ours: The function under test.
        theirs: The same function in plain PyTorch.
        inputs: Tensors by name.
        slack: As in `assert_no_worse_than`; larger where results may have few elements, whose rounding is chance.
        **options: Of `compute_results`.
    """
    with poison_memory():
        our_results = compute_results(ours, inputs, **options)
    # On a CPU, float32 matmuls use MKL, whose error is smaller than that of the default, oneDNN.
    with torch.backends.mkldnn.flags(enabled=inputs["x"].dtype != torch.float32):
        their_results = compute_results(theirs, inputs, **options)
    exact = compute_results(theirs, inputs, cast=torch.Tensor.double, **options)
    assert our_results.keys() == their_results.keys()
    for name, result in our_results.items():
        assert_no_worse_than(result, their_results[name], exact[name], slack=slack, name=name)


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Assert bitwise equality."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Assert equality up to rounding."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=lambda text, name=name: f"{name}: {text}")


def assert_equivalent(ours: Sequence[Tensor], theirs: Sequence[Tensor], rounded: torch.dtype = torch.float32) -> None:
    """Assert equal shapes, dtypes and strides, and equal values up to a few roundings.

    Args:
        ours: The results under test.
        theirs: The expected results.
        rounded: Dtype of intermediate results, whose rounding also shows in float32 results.
    """
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.dtype == other.dtype and one.shape == other.shape, index
        assert one.stride() == other.stride(), index
        precision = max(torch.finfo(one.dtype).eps, torch.finfo(rounded).eps)
        largest = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=8 * precision, atol=8 * precision * largest)


def make_view(kind: str, tensor: Tensor) -> Tensor:
    """Return a non-contiguous view with the values of `tensor` [B, N, D]."""
    batch, tokens, dim = tensor.shape
    large = tensor.new_full((batch + 1, tokens + 2, 2 * dim + 3), float("nan"))
    view = {
        "tokens": lambda: large[:batch, 1:-1, :dim],
        "columns": lambda: large[1:, 2:, 3 : dim + 3],
        "transposed": lambda: large.new_empty(tokens, batch, dim).transpose(0, 1),
        "every_other_column": lambda: large[1:, 2:, 3::2],
        "columns_first": lambda: large.new_empty(batch, dim, tokens).transpose(1, 2),
    }[kind]()
    assert not view.is_contiguous()
    return view.copy_(tensor)


VIEWS = ("tokens", "columns", "transposed", "every_other_column", "columns_first")


def count_saved_bytes(function: Callable, inputs: Mapping[str, Tensor]) -> int:
    """Count the bytes saved for backward apart from the inputs themselves, each storage once."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    own = {tensor.untyped_storage().data_ptr() for tensor in leaves.values()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**leaves)
    return sum(saved.values())
