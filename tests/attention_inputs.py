"""Inputs, tile overrides and the accuracy check that the tests of attention share."""

import contextlib
from unittest import mock

import pytest
import torch
from accuracy import assert_no_worse_than, poison_memory
from operations import DEVICE, randn

from fastvit.kernels import tuning
from fastvit.kernels.attention import attention
from fastvit.ops import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
PATHS = pytest.mark.parametrize("path", ["short", "long"])

# Small tiles, so that small inputs fill several. They replace the candidates of the tuning table.
LOOP = {"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 1}
PAIR = LOOP | {"key_value_rows": 32, "key_value_keys": 32, "key_value_warps": 8}
TILES = {
    ("short", "attention_forward"): {"rows": 32, "piece": 64, "blocks": 2, "num_warps": 8, "num_stages": 1},
    ("short", "attention_backward"): {"rows": 32, "keys_per_warp": 16, "transposed": 0, "num_stages": 1},
    ("long", "attention_forward"): LOOP,
    ("long", "attention_backward"): PAIR,
    ("transposed", "attention_forward"): LOOP,
    ("transposed", "attention_backward"): {"rows": 32, "keys_per_warp": 32, "transposed": 1, "num_stages": 1},
}


@contextlib.contextmanager
def use_kernels(path):
    """Within this context, attention runs the kernels of `path`: "short", "long" or "transposed"."""

    def candidates(operation, *_):
        return (TILES[path, operation],)

    with mock.patch.object(tuning, "find_candidates", candidates):
        yield


def make_inputs(batch, queries, keys, heads, dim, *, dtype=torch.float32, scale=1.0):
    return {
        "query": randn(batch, queries, heads, dim, dtype=dtype, seed=1, scale=scale),
        "key": randn(batch, keys, heads, dim, dtype=dtype, seed=2, scale=scale),
        "value": randn(batch, keys, heads, dim, dtype=dtype, seed=3),
    }


def make_mask(*shape, dtype=torch.bool, seed=5):
    """Return a mask that hides about a third of the keys, but never all keys of a query."""
    if dtype != torch.bool:
        return randn(*shape, dtype=dtype, seed=seed)
    mask = randn(*shape, seed=seed) > -0.4
    mask[..., 0] = True
    return mask


def compute_results(function, inputs, grad_out, *, cast=lambda tensor: tensor, **options):
    """Return the output and the gradients of all inputs except the mask, by name."""
    inputs = {
        name: tensor if tensor.dtype == torch.bool else cast(tensor).detach().requires_grad_(name != "mask")
        for name, tensor in inputs.items()
    }
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    out = function(**inputs, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), cast(grad_out))
    return {"out": out.detach()} | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def make_grad_out(inputs, seed=7):
    batch, queries, heads, dim = inputs["query"].shape
    return randn(batch, queries, heads * dim, dtype=inputs["query"].dtype, seed=seed)


def check(inputs, *, path="short", slack=1.25, worst=4, **options):
    """Compare the errors of output and gradients against float64 with PyTorch's in the same dtype."""
    grad_out = make_grad_out(inputs)
    with use_kernels(path), poison_memory():
        ours = compute_results(attention, inputs, grad_out, **options)
    theirs = compute_results(reference.attention, inputs, grad_out, **options)
    exact = compute_results(reference.attention, inputs, grad_out, cast=torch.Tensor.double, **options)
    for name, result in ours.items():
        assert_no_worse_than(result, theirs[name], exact[name], slack=slack, worst=worst, name=f"{path}: {name}")


def make_packed(lengths, heads=2, dim=32, dtype=torch.float32):
    """Return the concatenated tokens of several images [tokens, 3, H, D], and their cumulative lengths."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return randn(sum(lengths), 3, heads, dim, dtype=dtype), bounds
