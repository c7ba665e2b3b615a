"""Attention on packed qkv, on packed images of different sizes, and for the class token alone."""

import pytest
import torch
from accuracy import poison_memory

pytest.importorskip("triton")
from attention_inputs import PATHS, make_inputs, make_mask, make_packed, use_kernels
from operations import DEVICE, randn

from fastvit.kernels import attention as kernels
from fastvit.kernels.attention import attention, attention_packed
from fastvit.ops import reference


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_qkv_equals_separate_tensors_bit_for_bit(dtype, path):
    qkv = randn(2, 40, 3, 2, 48, dtype=dtype).requires_grad_()
    grad_out = randn(2, 40, 96, dtype=dtype, seed=1)
    with use_kernels(path), poison_memory():
        out = attention_packed(qkv)
        (grad,) = torch.autograd.grad(out, qkv, grad_out)
        separate = attention(*qkv.unbind(2))
        (separate_grad,) = torch.autograd.grad(separate, qkv, grad_out)
        flat = qkv.detach().flatten(2).requires_grad_()
        flat_out = attention_packed(flat, num_heads=2)
        (flat_grad,) = torch.autograd.grad(flat_out, flat, grad_out)
    assert torch.equal(out, separate)
    assert torch.equal(grad, separate_grad)
    assert torch.equal(out, flat_out)
    assert torch.equal(grad.flatten(2), flat_grad)
    assert grad.is_contiguous()


@PATHS
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_packed_images_match_single_images(path, masked):
    lengths = [17, 50, 1, 0, 33]
    qkv, bounds = make_packed(lengths, dtype=torch.bfloat16)
    grad_out = randn(len(qkv), 64, dtype=torch.bfloat16, seed=1)
    mask = randn(5, 2, 50, 50, dtype=torch.bfloat16, seed=2) if masked else None
    with use_kernels(path), poison_memory():
        out = attention_packed(qkv.requires_grad_(), mask=mask, cu_seqlens=bounds, max_seqlen=50)
        (grad,) = torch.autograd.grad(out, qkv, grad_out)
        first = 0
        for index, length in enumerate(lengths):
            if length == 0:
                continue
            here = slice(first, first + length)
            alone = qkv[None, here].detach().requires_grad_()
            own_mask = mask[index : index + 1, :, :length, :length] if masked else None
            expected = attention_packed(alone, mask=own_mask)
            (expected_grad,) = torch.autograd.grad(expected, alone, grad_out[None, here])
            # Not bitwise equal: the tile of a larger image sums in another order.
            close = {"atol": 1e-2, "rtol": 1.6e-2}
            torch.testing.assert_close(out[here], expected[0], **close)
            torch.testing.assert_close(grad[here], expected_grad[0], **close)
            first += length


@PATHS
def test_strided_cu_seqlens(path):
    qkv, bounds = make_packed([17, 9, 30, 31])
    with use_kernels(path):
        strided = attention_packed(qkv, cu_seqlens=torch.stack([bounds, bounds], 1)[:, 0], max_seqlen=31)
        assert torch.equal(strided, attention_packed(qkv, cu_seqlens=bounds, max_seqlen=31))


@PATHS
@pytest.mark.parametrize(("lengths", "most"), [((17, 9), 17), ((20, 10), 12), ((), 5)], ids=["few", "cut off", "none"])
def test_tokens_outside_all_images_are_zero(path, lengths, most):
    qkv, _ = make_packed([40])
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    owned = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    for first, length in zip(bounds.tolist(), lengths, strict=False):
        owned[first : first + min(length, most)] = True
    with use_kernels(path), poison_memory():
        out = attention_packed(qkv.requires_grad_(), cu_seqlens=bounds, max_seqlen=most)
        (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out.isfinite().all()
    assert grad.isfinite().all()
    for tensor in (out, grad):
        assert tensor[~owned].count_nonzero() == 0
        assert tensor[owned].flatten(1).any(1).all()


@pytest.mark.parametrize("bounds", [[1, 9], [0, 5, 4, 10], [0, 11], [-1, 10]], ids=str)
def test_invalid_cu_seqlens_raise_on_cpu(bounds):
    qkv, _ = make_packed([10])
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected 0, then no less than the one before, up to 10, got \["):
        attention_packed(qkv.cpu(), cu_seqlens=bounds, max_seqlen=10)


@PATHS
@pytest.mark.parametrize(
    "bounds", [[0, 7, 50], [3, -5, 10], [8, 2**31 - 1], [-(2**31), 4], [12, 40], [9, 3, 10]], ids=str
)
def test_invalid_cu_seqlens_never_access_memory_outside_the_tokens(bounds, path, monkeypatch):
    """On a GPU the values of cu_seqlens are not checked, so the check is disabled here.

    The surrounding memory reveals accesses outside the tensor: NaN would be read, and sevens would be overwritten.
    """
    monkeypatch.setattr(kernels, "_check_bounds", lambda cu_seqlens, tokens: cu_seqlens)
    around = torch.full((200, 3, 2, 16), float("nan"), device=DEVICE)
    qkv = around[100:110]
    qkv.copy_(randn(10, 3, 2, 16))
    sums = []

    def new_inside(like, shape, cu_seqlens, dtype=None):
        if shape[0] != 10:  # the log-sum-exp
            return torch.zeros(shape, device=DEVICE)
        whole = torch.full((200, *shape[1:]), 7.0, device=DEVICE)
        whole[100:110] = 0.0
        sums.append(whole)
        return whole[100:110]

    monkeypatch.setattr(kernels, "_alloc", new_inside)
    call = (None, torch.tensor(bounds, dtype=torch.int32, device=DEVICE), 60, 0.25, 0)
    with use_kernels(path):
        out, lse = kernels._launch_forward(*qkv.unbind(-3), *call)
        grad = new_inside(qkv, qkv.shape, None)
        kernels._launch_backward(torch.ones_like(out), *qkv.unbind(-3), out, lse, grad.unbind(-3), *call)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    for whole in sums:
        assert (whole[:100] == 7).all()
        assert (whole[110:] == 7).all()


@PATHS
def test_packed_images_of_one_size_equal_a_batch_bit_for_bit(path):
    qkv, bounds = make_packed([33, 33])
    with use_kernels(path):
        packed = attention_packed(qkv, cu_seqlens=bounds, max_seqlen=33)
        assert torch.equal(packed, attention_packed(qkv.unflatten(0, (2, 33))).flatten(0, 1))


def test_packed_images_match_reference():
    qkv, bounds = make_packed([17, 9, 30])
    mask = make_mask(1, 2, 30, 30)
    for options in ({}, {"mask": mask}, {"cu_seqlens": bounds[:2]}, {"cu_seqlens": bounds[:1]}):
        options = {"cu_seqlens": bounds, "max_seqlen": 30, **options}
        torch.testing.assert_close(attention_packed(qkv, **options), reference.attention_packed(qkv, **options))


def test_class_token_alone_matches_its_row_of_all_tokens():
    inputs = make_inputs(2, 50, 50, 2, 64)
    whole = attention(**inputs)
    alone = attention(inputs["query"][:, :1], inputs["key"], inputs["value"])
    torch.testing.assert_close(alone, whole[:, :1])
