"""Attention's fallbacks, operator registration, compilation, export, probabilities and invalid input."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from attention_inputs import DTYPES, make_inputs, make_mask, make_packed
from operations import DEVICE, randn

from fastvit.kernels import attention as kernels
from fastvit.kernels.attention import attention, attention_packed
from fastvit.ops import reference

FALLBACK_CASES = ["", "boolean mask", "additive mask", "cu_seqlens", "cu_seqlens and mask", "hidden row", "other keys"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FALLBACK_CASES)
def test_fallbacks_match_kernels(case, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_FALLBACK_SCORES", 2 * 9 * 9)  # one image at a time
    queries = 5 if case == "other keys" else 9
    mask = bounds = most = None
    shape = (3, 9)
    if "cu_seqlens" in case:  # 27 tokens: the second image is truncated, the last two tokens belong to no image
        bounds, most, shape = torch.tensor([0, 4, 16, 25], dtype=torch.int32, device=DEVICE), 9, (27,)
        mask = randn(1, 2, 9, 9) if "mask" in case else None
    elif "mask" in case:
        mask = make_mask(3, 1, 9, 9, dtype=torch.bool if case == "boolean mask" else dtype)
    elif case == "hidden row":
        mask = torch.zeros(1, 1, 9, 9, device=DEVICE)
        mask[..., 2, :] = float("-inf")
    qkv = randn(*shape, 3, 2, 16, dtype=dtype)
    query, key, value = qkv.unbind(-3)
    query = query[:, :queries] if bounds is None else query
    options = (mask, bounds, most, 0.3, 0)
    ours = kernels._attention(query, key, value, *options)
    grad_out = randn(*ours[0].shape, dtype=dtype, seed=4)
    grads = kernels._attention_backward(grad_out, query, key, value, *ours, *options)
    plain = kernels._forward_fallback(query, key, value, *options)
    plain_grads = kernels._backward_fallback(grad_out, query, key, value, *ours, *options)
    close = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1.6e-2}
    for one, other in zip((*ours, *grads), (*plain, *plain_grads), strict=True):
        torch.testing.assert_close(one, other, **close, check_stride=True)
    if queries == 9:
        for one, other in zip(plain, kernels._packed_forward_fallback(qkv, *options), strict=True):
            assert torch.equal(one, other)
        packed = kernels._packed_backward_fallback(grad_out, qkv, *ours, *options)
        assert packed.is_contiguous()
        for one, other in zip(plain_grads, packed.unbind(-3), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("options", ["", "mask", "cu_seqlens"])
def test_opcheck(options):
    mask = randn(1, 2, 9, 9) if options == "mask" else None
    bounds, most = (
        (torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE), 9) if options == "cu_seqlens" else (None, None)
    )
    call = (mask, bounds, most, 0.25, 0)
    qkv = randn(*(() if bounds is not None else (2,)), 9, 3, 2, 16)
    parts = [part.clone().requires_grad_() for part in qkv.unbind(-3)]
    out, lse = kernels._attention(*parts, *call)
    torch.library.opcheck(kernels._attention, (*parts, *call))
    torch.library.opcheck(kernels._attention_packed, (qkv.requires_grad_(), *call))
    detached = [tensor.detach() for tensor in (*parts, out, lse)]
    torch.library.opcheck(kernels._attention_backward, (torch.ones_like(detached[3]), *detached, *call))
    packed = (torch.ones_like(detached[3]), qkv.detach(), *detached[3:], *call)
    torch.library.opcheck(kernels._attention_packed_backward, packed)


def apply_block(qkv, mask):
    """Apply both operators, one after the other."""
    out = attention_packed(qkv, num_heads=2, mask=mask)
    query = out.unflatten(-1, (2, -1))
    return attention(query, query, out.unflatten(-1, (2, -1)).detach(), scale=0.2)


def compute_block_results(function, qkv, mask):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, mask)
    return [out, *torch.autograd.grad(out.square().sum(), qkv)]


def test_compiles_without_graph_breaks():
    compiled = torch.compile(apply_block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second has a dynamic shape
        inputs = randn(batch, 9, 96), randn(1, 2, 9, 9, seed=1)
        for ours, expected in zip(
            compute_block_results(compiled, *inputs), compute_block_results(apply_block, *inputs), strict=True
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_packed_images(autocast):
    def function(qkv, bounds):
        return attention_packed(qkv, cu_seqlens=bounds, max_seqlen=12)

    qkv, bounds = make_packed([5, 12])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        assert torch.equal(compiled(qkv, bounds), function(qkv, bounds))


def test_activation_checkpointing_matches_plain_backward():
    def function(qkv):
        return attention_packed(qkv, num_heads=2)

    qkv = randn(2, 9, 96).requires_grad_()
    grads = []
    for run in (function, lambda qkv: checkpoint(function, qkv, use_reentrant=False)):
        grads.append(torch.autograd.grad(run(qkv).square().sum(), qkv)[0])
    assert torch.equal(*grads)


def test_exports_with_dynamic_batch_size():
    class Block(torch.nn.Module):
        def forward(self, qkv, mask):
            return apply_block(qkv, mask)

    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    mask = randn(1, 2, 9, 9, seed=1)
    program = torch.export.export(Block(), (randn(2, 9, 96), mask), dynamic_shapes=(batch, None))
    qkv = randn(5, 9, 96, seed=8)
    assert torch.equal(program.module()(qkv, mask), apply_block(qkv, mask))


def test_autocast_casts_float32_as_in_pytorch():
    inputs = make_inputs(1, 20, 30, 2, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(**inputs)
        theirs = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in inputs.values()))
        assert theirs.dtype == out.dtype == torch.bfloat16
        assert torch.equal(out, attention(**{name: tensor.bfloat16() for name, tensor in inputs.items()}))
        assert attention_packed(randn(1, 5, 96), num_heads=2).dtype == torch.bfloat16


@DTYPES
def test_probabilities_are_exact_up_to_rounding(dtype):
    inputs = make_inputs(1, 20, 30, 2, 16, dtype=dtype)
    query, key = inputs["query"], inputs["key"]
    for mask in (None, make_mask(1, 1, 20, 30), randn(1, 2, 20, 30, seed=5)):
        ours = reference.attention_probabilities(query, key, mask=mask)
        double = mask if mask is None or mask.dtype == torch.bool else mask.double()
        exact = reference.attention_probabilities(query.double(), key.double(), mask=double)
        assert exact.dtype == torch.float64
        assert ours.dtype == dtype
        assert_no_worse_than(ours, exact.to(dtype), exact, slack=2.0 if dtype == torch.float32 else 1.05)
        value = torch.eye(30, device=DEVICE)[None, :, None].expand(1, -1, 2, -1)[..., :16]
        rows = attention(query.float(), key.float(), value, mask=mask).unflatten(-1, (2, -1)).transpose(1, 2)
        torch.testing.assert_close(
            ours[..., :16].float(), rows, atol=torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps
        )


def test_probabilities_of_fully_masked_rows_are_zero():
    query = randn(1, 4, 1, 16).requires_grad_()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=DEVICE)
    mask[..., 2, :] = False
    probabilities = reference.attention_probabilities(query, query, mask=mask)
    assert probabilities[0, 0, 2].count_nonzero() == 0
    (grad,) = torch.autograd.grad(probabilities.square().sum(), query)
    assert grad.isfinite().all()


INVALID = [
    ({"query": torch.zeros(2, 5, 16)}, r"query: expected \[B, Nq, H, D\].*got \[2, 5, 16\]"),
    ({"query": torch.zeros(2, 0, 2, 16)}, r"query: .*at least one query, got \[2, 0, 2, 16\]"),
    ({"key": torch.zeros(2, 0, 2, 16), "value": torch.zeros(2, 0, 2, 16)}, "key: .*at least one key"),
    ({"query": torch.zeros(2, 5, 2, 20)}, "query: expected a head dim that is a multiple of 8 from 16 to 128, got 20"),
    ({"query": torch.zeros(2, 5, 2, 8)}, "query: expected a head dim .*got 8"),
    ({"query": torch.zeros(2, 5, 2, 136)}, "query: expected a head dim .*got 136"),
    ({"query": torch.zeros(2, 5, 2, 16).double()}, "query: expected torch.float32 .*got torch.float64"),
    ({"key": torch.zeros(2, 7, 3, 16)}, r"key: expected \[2, 7, 2, 16\], got \[2, 7, 3, 16\]"),
    ({"key": torch.zeros(2, 7, 2, 16).half()}, "key: expected torch.float32, got torch.float16"),
    ({"value": torch.zeros(2, 6, 2, 16)}, r"value: expected \[2, 7, 2, 16\], got \[2, 6, 2, 16\]"),
    ({"value": torch.zeros(2, 7, 2, 16, device="meta")}, "value: expected device cpu like the others, got meta"),
    ({"mask": torch.zeros(2, 5, 6)}, r"mask: expected something broadcastable to \[2, 2, 5, 7\], got \[2, 5, 6\]"),
    ({"mask": torch.zeros(5, 7).int()}, "mask: expected torch.bool or .*got torch.int32"),
    ({"mask": torch.zeros(5, 7, device="meta")}, "mask: expected device cpu like the others, got meta"),
    ({"mask": torch.zeros(5, 7).requires_grad_()}, "mask: expected one that requires no gradient"),
    ({"cu_seqlens": torch.zeros(3).int(), "max_seqlen": 5}, r"query: expected \[tokens, H, D\] with cu_seqlens"),
]
INVALID_PACKED = [
    ({"qkv": torch.zeros(2, 5, 96)}, "num_heads: .*a third of 96, got None"),
    ({"qkv": torch.zeros(2, 5, 96), "num_heads": 5}, "num_heads: .*96, got 5"),
    ({"qkv": torch.zeros(2, 5, 3, 2, 16), "num_heads": 3}, "num_heads: expected 2, .*got 3"),
    ({"qkv": torch.zeros(2, 5, 2, 2, 16)}, r"qkv: expected \[B, N, 3, H, D\], got \[2, 5, 2, 2, 16\]"),
    ({"qkv": torch.zeros(5, 3, 2, 16)}, r"qkv: expected .*got .5, 3, 2, 16."),
    (
        {"qkv": torch.zeros(2, 5, 3, 2, 16), "cu_seqlens": torch.zeros(2).int(), "max_seqlen": 5},
        r"qkv: expected \[tokens,",
    ),
    (
        {"qkv": torch.zeros(5, 3, 2, 16), "cu_seqlens": torch.zeros(2), "max_seqlen": 5},
        "cu_seqlens: .*got torch.float32",
    ),
    (
        {"qkv": torch.zeros(5, 3, 2, 16), "cu_seqlens": torch.zeros(0).int(), "max_seqlen": 5},
        r"cu_seqlens: .*got \[0\]",
    ),
    ({"qkv": torch.zeros(5, 3, 2, 16), "cu_seqlens": torch.zeros(2).int()}, "max_seqlen: expected .*got None"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID)
def test_invalid_input_raises_before_launch(changes, message, monkeypatch):
    monkeypatch.setattr(kernels, "_attention", None)
    inputs = {name: tensor.cpu() for name, tensor in make_inputs(2, 5, 7, 2, 16).items()} | changes
    with pytest.raises(ValueError, match=message):
        attention(**inputs)


@pytest.mark.parametrize(("arguments", "message"), INVALID_PACKED)
def test_invalid_packed_input_raises_before_launch(arguments, message, monkeypatch):
    monkeypatch.setattr(kernels, "_attention_packed", None)
    with pytest.raises(ValueError, match=message):
        attention_packed(**arguments)
