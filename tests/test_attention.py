"""Attention: as exact as PyTorch's against float64, on a GPU, or interpreted without one."""

import contextlib
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than, errors, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastvit import reference

pytest.importorskip("triton")
from fastvit.kernels import attention as kernels
from fastvit.kernels import tuning
from fastvit.kernels.attention import attention, attention_packed, dropout_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
PATHS = pytest.mark.parametrize("path", ["short", "long"])

# Small tiles, so that small inputs fill several: which kernels run is decided here, whatever the table says.
LOOP = {"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 1}
PAIR = LOOP | {"key_value_rows": 32, "key_value_keys": 32, "key_value_warps": 8}
TILES = {
    ("short", "attention_forward"): {"rows": 32, "piece": 64, "blocks": 2, "num_warps": 8, "num_stages": 1},
    ("short", "attention_backward"): {"rows": 32, "keys_per_warp": 16, "num_stages": 1},
    ("short", "attention_mask_backward"): LOOP,
    ("long", "attention_forward"): LOOP,
    ("long", "attention_backward"): PAIR,
    ("long", "attention_mask_backward"): LOOP,
}


@contextlib.contextmanager
def kernels_of(path):
    """Inside, the kernels for short or for long sequences compute attention."""

    def candidates(operation, *_):
        return (TILES[path, operation],)

    with mock.patch.object(tuning, "candidates", candidates), mock.patch.object(tuning, "_chosen", {}):
        yield


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def inputs_of(batch, queries, keys, heads, dim, *, dtype=torch.float32, scale=1.0):
    return {
        "query": random(batch, queries, heads, dim, dtype=dtype, seed=1, scale=scale),
        "key": random(batch, keys, heads, dim, dtype=dtype, seed=2, scale=scale),
        "value": random(batch, keys, heads, dim, dtype=dtype, seed=3),
    }


def random_mask(*shape, dtype=torch.bool, seed=5):
    """Hides a third of the keys, but never all of a query."""
    if dtype != torch.bool:
        return random(*shape, dtype=dtype, seed=seed)
    mask = random(*shape, seed=seed) > -0.4
    mask[..., 0] = True
    return mask


class FromLogSumExp(torch.autograd.Function):
    """Attention by PyTorch's operations as its own kernels on GPUs compute it: nothing but the log-sum-exp is kept, and
    probabilities and their gradient are rounded to the inputs' dtype. It stands in where the CPU's scaled_dot_product_
    attention does not: with a mask that requires a gradient, it computes and keeps everything in float32."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        scores = query.float() @ key.float().mT * scale + mask.float()
        lse = scores.logsumexp(-1, keepdim=True)
        out = ((scores - lse).exp().to(value.dtype).float() @ value.float()).to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, lse, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, mask, lse, out = ctx.saved_tensors
        dtype = query.dtype
        query, key, value, out, grad_out = (tensor.float() for tensor in (query, key, value, out, grad_out))
        probabilities = (query @ key.mT * ctx.scale + mask.float() - lse).exp()
        grad_value = probabilities.to(dtype).float().mT @ grad_out
        grad_scores = probabilities * (grad_out @ value.mT - (grad_out * out).sum(-1, keepdim=True))
        rounded = grad_scores.to(dtype).float()
        grads = (rounded @ key * ctx.scale, rounded.mT @ query * ctx.scale, grad_value)
        return (*(grad.to(dtype) for grad in grads), grad_scores.sum_to_size(mask.shape).to(mask.dtype), None)


def pytorch(query, key, value, mask=None, scale=None, **options):
    if mask is None or not mask.requires_grad or query.dtype == torch.float64:
        return reference.attention(query, key, value, mask=mask, scale=scale, **options)
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return FromLogSumExp.apply(*heads_first, mask, scale).transpose(1, 2).flatten(2)


def results(function, inputs, grad_out, *, cast=lambda tensor: tensor, **options):
    """The output and the gradient of every floating input, by name."""
    inputs = {
        name: tensor if tensor.dtype == torch.bool else cast(tensor).detach().requires_grad_()
        for name, tensor in inputs.items()
    }
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    out = function(**inputs, **options)
    grads = torch.autograd.grad(out, list(wanted.values()), cast(grad_out))
    return {"out": out.detach()} | {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def grad_for(inputs, seed=7):
    batch, queries, heads, dim = inputs["query"].shape
    return random(batch, queries, heads * dim, dtype=inputs["query"].dtype, seed=seed)


def check(inputs, *, path="short", slack=1.25, **options):
    """Output and every gradient against float64, beside PyTorch in the same dtype."""
    grad_out = grad_for(inputs)
    with kernels_of(path), poisoned():
        ours = results(attention, inputs, grad_out, **options)
    theirs = results(pytorch, inputs, grad_out, **options)
    exact = results(pytorch, inputs, grad_out, cast=torch.Tensor.double, **options)
    for name, result in ours.items():
        assert_no_worse_than(result, theirs[name], exact[name], slack=slack, name=f"{path}: {name}")


# ---------------------------------------------------------------------------------------------------------------------
# Exactness
# ---------------------------------------------------------------------------------------------------------------------


@PATHS
@DTYPES
@pytest.mark.parametrize("dim", [16, 24, 48, 64, 72, 80, 88, 96, 112, 128])
def test_outputs_and_gradients_are_as_exact_as_pytorchs(dim, dtype, path):
    check(inputs_of(1, 40, 70, 1, dim, dtype=dtype), path=path)


@PATHS
@pytest.mark.parametrize("tokens", [1, 17, 50, 197, 256])
def test_any_number_of_tokens(tokens, path):
    check(inputs_of(1, tokens, tokens, 1, 16, dtype=torch.bfloat16), path=path)


@pytest.mark.parametrize("tokens", [257, 577, 785, 1025])
def test_many_tokens(tokens):
    tile = {"rows": 128, "keys": 128}
    pair = PAIR | tile | {"key_value_rows": 128, "key_value_keys": 128}
    larger = {("long", "attention_forward"): LOOP | tile, ("long", "attention_backward"): pair}
    with mock.patch.dict(TILES, larger):
        check(inputs_of(1, tokens, tokens, 1, 16, dtype=torch.bfloat16), path="long")


@PATHS
@pytest.mark.parametrize(("queries", "keys"), [(1, 197), (50, 17), (5, 130)])
def test_other_keys_than_queries(queries, keys, path):
    # The rounding of one log-sum-exp is common to its row: of a few rows, which error is larger is chance.
    slack = 1.25 if queries > 5 else 2.0
    check(inputs_of(2, queries, keys, 2, 32, dtype=torch.bfloat16), path=path, slack=slack)
    check(inputs_of(2, queries, keys, 2, 32), path=path, slack=slack)


@PATHS
def test_a_single_key_gives_its_value(path):
    inputs = inputs_of(2, 70, 1, 2, 32)
    with kernels_of(path):
        found = results(attention, inputs, grad_for(inputs))
    torch.testing.assert_close(found["out"], inputs["value"].flatten(2).expand(-1, 70, -1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["grad value"].flatten(2), grad_for(inputs).sum(1, keepdim=True))
    for name in ("grad query", "grad key"):
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]), rtol=0, atol=1e-4)


@PATHS
def test_a_scale_of_ones_own(path):
    check(inputs_of(1, 20, 30, 2, 32), path=path, scale=0.3)


@PATHS
@DTYPES
def test_scores_of_ten_thousand(dtype, path):
    inputs = inputs_of(1, 40, 70, 1, 64, dtype=dtype, scale=100.0)
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs["query"].float(), inputs["key"].float()) / 8
    assert scores.max() > 1e4
    assert scores.min() < -1e4
    with kernels_of(path), poisoned():
        ours = results(attention, inputs, grad_for(inputs))
    theirs = results(pytorch, inputs, grad_for(inputs))
    exact = results(pytorch, inputs, grad_for(inputs), cast=torch.Tensor.double)
    assert_no_worse_than(ours["out"], theirs["out"], exact["out"], name="out")
    # A score is known to a unit in its last place, and backward, which may add up its products in another order,
    # knows the probabilities to as much.
    unit = torch.finfo(torch.float32).eps * scores.abs().max().item()
    for name, result in ours.items():
        (error, _), (their_error, _) = (errors(found, exact[name]) for found in (result, theirs[name]))
        assert error < 1.25 * their_error + unit, name


@pytest.mark.parametrize("index", range(max(len(rule.candidates) for rule in tuning.TABLE)))
def test_every_tile_of_the_table(index):
    inputs = inputs_of(1, 40, 197, 1, 32, dtype=torch.bfloat16) | {"mask": random(1, 1, 40, 197, dtype=torch.bfloat16)}
    rules = [rule for rule in tuning.TABLE if rule.operation.startswith("attention") and index < len(rule.candidates)]
    tiles = {(rule.operation, tuple(rule.candidates[index].items())) for rule in rules}
    for operation, tile in sorted(tiles):
        with mock.patch.dict(TILES, {("long", operation): dict(tile)}):
            check(inputs, path="long")


def test_the_kernels_for_short_sequences_are_used_where_they_are_made_for():
    plain = kernels.Call(None, None, None, None, 1.0, 0.0)
    sizes = kernels.Sizes(batch=256, heads=12, rows=256 * 197, queries=197, keys=197, dim=64)
    hopper = tuning.Device("an H100", "sm_90", 132)
    with mock.patch.object(tuning, "describe", lambda _: hopper):
        for call, case, short in [
            (plain, sizes, True),
            (plain, sizes._replace(keys=257), False),
            (plain, sizes._replace(batch=1), False),
            (plain._replace(seed=torch.zeros(1)), sizes, False),
            (plain._replace(mask=torch.zeros(1)), sizes, False),
        ]:
            shape_class = kernels._shape(case, call)
            for operation, mark in (("attention_forward", "piece"), ("attention_backward", "keys_per_warp")):
                first, *_ = tuning.candidates(operation, shape_class, torch.bfloat16, torch.device("cpu"))
                assert (mark in first) == short, (operation, shape_class)


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------

MASK_SHAPES = [(1, 70), (40, 70), (2, 1, 1, 70), (1, 2, 40, 70), (2, 2, 40, 70)]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_boolean_masks(shape, dtype, path):
    check(inputs_of(2, 40, 70, 2, 16, dtype=dtype) | {"mask": random_mask(*shape)}, path=path)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_additive_masks_and_their_gradients(shape, dtype, path):
    # Gradients of 70 and 140 elements: too few for their errors' ratio not to be partly chance (1.28 on one processor).
    slack = 1.25 if math.prod(shape) > 140 else 1.6
    check(inputs_of(2, 40, 70, 2, 16, dtype=dtype) | {"mask": random_mask(*shape, dtype=dtype)}, path=path, slack=slack)


def test_a_mask_that_is_the_same_for_all_keys_changes_nothing():
    inputs = inputs_of(2, 40, 70, 2, 16)
    mask = random(2, 1, 40, 1, seed=5).requires_grad_()
    out = attention(**inputs, mask=mask)
    torch.testing.assert_close(out, attention(**inputs))
    (grad,) = torch.autograd.grad(out, mask, grad_for(inputs))
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-5, rtol=0)


def test_a_float32_mask_beside_half_precision():
    inputs = inputs_of(1, 20, 30, 2, 16, dtype=torch.bfloat16)
    mask = random(1, 2, 20, 30, seed=5)
    ours = results(attention, inputs | {"mask": mask}, grad_for(inputs))
    rounded = mask.bfloat16().float()
    exact = results(attention, inputs | {"mask": rounded}, grad_for(inputs))
    assert ours["grad mask"].dtype == torch.float32
    same = results(attention, inputs | {"mask": mask.bfloat16()}, grad_for(inputs))
    assert torch.equal(exact["out"], same["out"])
    assert torch.equal(exact["grad mask"].bfloat16(), same["grad mask"])
    assert not torch.equal(ours["out"], same["out"])


@PATHS
@pytest.mark.parametrize("kind", ["boolean", "minus infinity", "lowest"])
def test_rows_whose_every_key_is_hidden_give_zeros(kind, path):
    inputs = inputs_of(2, 40, 70, 2, 16)
    shown = random_mask(2, 1, 40, 70)
    shown[0, :, 3] = False
    shown[1, :, 33:] = False
    mask = shown
    if kind != "boolean":
        hidden = float("-inf") if kind == "minus infinity" else torch.finfo(torch.float32).min
        mask = torch.zeros(shown.shape, device=DEVICE).masked_fill(~shown, hidden)
    with kernels_of(path), poisoned():
        ours = results(attention, inputs | {"mask": mask}, grad_for(inputs))
    theirs = results(reference.attention, inputs | {"mask": shown}, grad_for(inputs))
    for name in ("out", "grad query"):
        assert ours[name][0, 3].count_nonzero() == 0
        assert ours[name][1, 33:].count_nonzero() == 0
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("programs", [1, 3, 10000])
def test_the_gradient_of_a_shared_mask_is_summed_in_any_number_of_parts(programs, monkeypatch):
    monkeypatch.setattr(kernels, "MASK_PROGRAMS", programs)
    check(inputs_of(5, 20, 30, 3, 16, dtype=torch.bfloat16) | {"mask": random(1, 1, 20, 30, dtype=torch.bfloat16)})
    check(inputs_of(5, 20, 30, 3, 16) | {"mask": random(5, 1, 20, 30)})
    check(inputs_of(5, 20, 30, 3, 16) | {"mask": random(1, 3, 20, 30)})


# ---------------------------------------------------------------------------------------------------------------------
# The packed form, pictures of different sizes, the class token
# ---------------------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_gives_the_bits_of_separate_and_one_gradient(dtype, path):
    qkv = random(2, 40, 3, 2, 48, dtype=dtype).requires_grad_()
    grad_out = random(2, 40, 96, dtype=dtype, seed=1)
    with kernels_of(path), poisoned():
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


def packed_batch(lengths, heads=2, dim=32, dtype=torch.float32):
    """Tokens of pictures one after the other [tokens, 3, H, D], and where each picture begins."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return random(sum(lengths), 3, heads, dim, dtype=dtype), bounds


@PATHS
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_pictures_of_different_sizes_give_what_each_gives_alone(path, masked):
    lengths = [17, 50, 1, 0, 33]
    qkv, bounds = packed_batch(lengths, dtype=torch.bfloat16)
    grad_out = random(len(qkv), 64, dtype=torch.bfloat16, seed=1)
    mask = random(5, 2, 50, 50, dtype=torch.bfloat16, seed=2) if masked else None
    leaves = [qkv, *([mask] if masked else [])]
    with kernels_of(path):
        for leaf in leaves:
            leaf.requires_grad_()
        with poisoned():
            out = attention_packed(qkv, mask=mask, cu_seqlens=bounds, max_seqlen=50)
            grads = torch.autograd.grad(out, leaves, grad_out)
        first = 0
        for index, length in enumerate(lengths):
            if length == 0:
                assert mask is None or grads[1][index].count_nonzero() == 0
                continue
            alone = [
                qkv[None, first : first + length].detach(),
                *([mask[index : index + 1, :, :length, :length]] if masked else []),
            ]
            alone = [tensor.detach().requires_grad_() for tensor in alone]
            expected = attention_packed(alone[0], mask=alone[1] if masked else None)
            expected_grads = torch.autograd.grad(expected, alone, grad_out[None, first : first + length])
            here = slice(first, first + length)
            # Not the same bits: the tile of a larger picture sums in another order.
            close = {"atol": 1e-2, "rtol": 1.6e-2}
            torch.testing.assert_close(out[here], expected[0], **close)
            torch.testing.assert_close(grads[0][here], expected_grads[0][0], **close)
            if masked:
                torch.testing.assert_close(grads[1][index, :, :length, :length], expected_grads[1][0], **close)
                assert grads[1][index, :, length:].count_nonzero() == 0
                assert grads[1][index, :, :, length:].count_nonzero() == 0
            first += length


@PATHS
def test_pictures_of_one_size_give_the_bits_of_a_batch(path):
    qkv, bounds = packed_batch([33, 33])
    with kernels_of(path):
        packed = attention_packed(qkv, cu_seqlens=bounds, max_seqlen=33)
        assert torch.equal(packed, attention_packed(qkv.unflatten(0, (2, 33))).flatten(0, 1))


def test_the_reference_agrees_about_pictures_of_different_sizes():
    qkv, bounds = packed_batch([17, 9, 30])
    mask = random_mask(1, 2, 30, 30)
    for options in ({}, {"mask": mask}):
        options |= {"cu_seqlens": bounds, "max_seqlen": 30}
        torch.testing.assert_close(attention_packed(qkv, **options), reference.attention_packed(qkv, **options))


def test_the_class_token_alone_gives_its_row_of_all_tokens():
    inputs = inputs_of(2, 50, 50, 2, 64)
    whole = attention(**inputs)
    alone = attention(inputs["query"][:, :1], inputs["key"], inputs["value"])
    torch.testing.assert_close(alone, whole[:, :1])


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


def with_dropout(query, key, value, kept, p, mask=None):
    """The definition, with the probabilities that are kept given."""
    probabilities = reference.attention_probabilities(query, key, mask=mask) * kept / (1 - p)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, value).flatten(2)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_that_of_its_mask_in_both_directions(dtype, path):
    inputs = inputs_of(2, 40, 70, 2, 16, dtype=dtype) | {"mask": random(1, 2, 40, 70, dtype=dtype, seed=5)}
    seed = torch.tensor([2**62 + 12345], device=DEVICE)
    kept = dropout_mask(seed, 2, 2, 40, 70, 0.3)
    with kernels_of(path), poisoned():
        ours = results(attention, inputs, grad_for(inputs), dropout_p=0.3, seed=seed)
    theirs = results(with_dropout, inputs, grad_for(inputs), kept=kept, p=0.3)
    exact = results(with_dropout, inputs, grad_for(inputs), cast=torch.Tensor.double, kept=kept, p=0.3)
    for name, result in ours.items():
        # PyTorch's operations one by one keep the probabilities; from the log-sum-exp they have one rounding more.
        assert_no_worse_than(result, theirs[name], exact[name], slack=3.0, name=name)


def test_dropout_of_pictures_of_different_sizes():
    lengths = [17, 30]
    qkv, bounds = packed_batch(lengths)
    seed = torch.tensor([3], device=DEVICE)
    kept = dropout_mask(seed, 2, 2, 30, 30, 0.5)
    out = attention_packed(qkv, cu_seqlens=bounds, max_seqlen=30, dropout_p=0.5, seed=seed)
    for index, (length, part) in enumerate(zip(lengths, qkv.split(lengths), strict=True)):
        expected = with_dropout(*part[None].unbind(2), kept[index : index + 1, :, :length, :length], 0.5)
        first = sum(lengths[:index])
        torch.testing.assert_close(out[first : first + length], expected[0])


def test_the_dropout_mask_is_fair_and_differs_by_seed_picture_and_head():
    seed = torch.tensor([11], device=DEVICE)
    kept = dropout_mask(seed, 3, 4, 50, 50, 0.3)
    count = kept.numel()
    assert abs(kept.float().mean().item() - 0.7) < 4 * math.sqrt(0.3 * 0.7 / count)
    planes = kept.flatten(0, 1).flatten(1).float()
    correlation = torch.corrcoef(planes) - torch.eye(len(planes), device=DEVICE)
    assert correlation.abs().max() < 5 / math.sqrt(planes.shape[1])
    assert torch.equal(kept, dropout_mask(seed, 3, 4, 50, 50, 0.3))
    assert not torch.equal(kept, dropout_mask(seed + 1, 3, 4, 50, 50, 0.3))
    assert not torch.equal(kept, dropout_mask(seed + 2**32, 3, 4, 50, 50, 0.3))


def test_dropout_follows_the_generator():
    inputs = inputs_of(1, 20, 30, 1, 16)
    torch.manual_seed(5)
    first, second = (attention(**inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(attention(**inputs, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_all_dropped_or_nothing():
    inputs = inputs_of(1, 20, 30, 1, 16)
    seed = torch.tensor([1], device=DEVICE)
    for name, result in results(attention, inputs, grad_for(inputs), dropout_p=1.0, seed=seed).items():
        assert result.count_nonzero() == 0, name
    assert torch.equal(attention(**inputs, dropout_p=0.0, seed=seed), attention(**inputs))


# ---------------------------------------------------------------------------------------------------------------------
# Memory: strides, offsets, what is empty, what is not finite
# ---------------------------------------------------------------------------------------------------------------------

VIEWS = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch second": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "packed": lambda t: torch.stack([t, t, t], 2)[:, :, 1],
    "every other token": lambda t: torch.stack([t, t], 2).flatten(1, 2)[:, ::2],
    "offset": lambda t: F.pad(t, (3, 5, 1, 1, 2, 2))[:, 2:-2, 1:-1, 3:-5],
    "one head for all": lambda t: t,
    "every other column": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
}


@PATHS
@pytest.mark.parametrize("kind", VIEWS)
def test_views_are_read_where_they_lie(kind, path):
    inputs = inputs_of(2, 20, 40, 2, 16)
    if kind == "one head for all":
        inputs["key"] = inputs["key"][:, :, :1].expand(-1, -1, 2, -1)
    views = {name: VIEWS[kind](tensor) for name, tensor in inputs.items()}
    grad_out = grad_for(inputs)
    for tensor in views.values():
        assert (kernels._readable(tensor).data_ptr() == tensor.data_ptr()) == (kind != "every other column")
    with kernels_of(path):
        expected = results(attention, {name: tensor.contiguous() for name, tensor in inputs.items()}, grad_out)
        for name, result in results(attention, views, VIEWS["batch second"](grad_out[..., None])[..., 0]).items():
            assert torch.equal(result, expected[name]), name


@PATHS
def test_expanded_gradients(path):
    inputs = inputs_of(2, 20, 40, 2, 16)
    one = torch.ones((), device=DEVICE)
    with kernels_of(path):
        expanded = results(attention, inputs, one.expand(2, 20, 32))
        for name, result in results(attention, inputs, torch.ones(2, 20, 32, device=DEVICE)).items():
            assert torch.equal(result, expanded[name]), name


def test_elements_beyond_two_to_the_31_are_found():
    inputs = inputs_of(2, 3, 3, 1, 16, dtype=torch.float16)
    storage = torch.UntypedStorage(2**32 + 2**12, device=DEVICE)  # memory that nobody touches is not really taken
    for strides in [(2**31, 16, 16, 1), (16, 2**30, 16, 1)]:
        far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage).as_strided((2, 3, 1, 16), strides)
        if strides[1] > 16:
            far = far[:, :2]
        far.copy_(inputs["key"][:, : far.shape[1]])
        near = {name: tensor[:, : far.shape[1]] for name, tensor in inputs.items()}
        for path in ("short", "long"):
            with kernels_of(path):
                assert torch.equal(attention(near["query"], far, near["value"]), attention(**near))


@PATHS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_and_infinity_spread_as_in_pytorch(name, bad, path):
    inputs = inputs_of(2, 20, 40, 1, 16)
    inputs[name][1, 7, 0, 3] = bad
    with kernels_of(path):
        ours = attention(**inputs)
    theirs = F.scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in inputs.values())).transpose(1, 2)
    assert torch.equal(ours.isnan(), theirs.flatten(2).isnan())
    assert torch.equal(ours.isinf(), theirs.flatten(2).isinf())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_the_gradients_of_its_own_picture_alone(bad):
    inputs = inputs_of(2, 20, 40, 1, 16)
    inputs["value"][1, 7, 0, 3] = bad
    for path in ("short", "long"):
        with kernels_of(path):
            for name, grad in results(attention, inputs, grad_for(inputs)).items():
                assert grad[0].isfinite().all(), name
                if name in ("grad query", "grad key"):
                    assert not grad[1].isfinite().any(), name


@pytest.mark.parametrize("shape", [(0, 5, 7, 2, 16), (2, 5, 7, 0, 16)])
def test_an_empty_batch(shape):
    inputs = inputs_of(*shape)
    for name, result in results(attention, inputs, grad_for(inputs)).items():
        assert result.numel() == 0, name
    mask = random(1, 1, 5, 7).requires_grad_()
    (grad,) = torch.autograd.grad(attention(**inputs, mask=mask), mask, grad_for(inputs))
    assert torch.equal(grad, torch.zeros_like(grad))
    qkv, bounds = packed_batch([0, 0])
    assert attention_packed(qkv, cu_seqlens=bounds, max_seqlen=4).shape == (0, 64)


@PATHS
def test_two_runs_give_the_same_bits(path):
    inputs = inputs_of(2, 70, 90, 2, 16, dtype=torch.bfloat16) | {"mask": random(1, 1, 70, 90, dtype=torch.bfloat16)}
    with kernels_of(path):
        first, second = (results(attention, inputs, grad_for(inputs)) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@PATHS
def test_a_picture_does_not_depend_on_those_beside_it(path):
    inputs = inputs_of(3, 40, 40, 2, 16, dtype=torch.bfloat16)
    with kernels_of(path):
        whole = attention(**inputs)
        assert torch.equal(attention(**{name: tensor[1:2] for name, tensor in inputs.items()}), whole[1:2])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(2, 70), st.integers(1, 2)),
    dim=st.sampled_from(range(16, 129, 8)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kinds=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 3),
    mask=st.sampled_from([None, (1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 1), (0, 0, 0)]),
    boolean=st.booleans(),
    path=st.sampled_from(["short", "long"]),
)
def test_any_shape_layout_dtype_and_mask(sizes, dim, dtype, kinds, mask, boolean, path):
    batch, queries, keys, heads = sizes
    inputs = inputs_of(batch, queries, keys, heads, dim, dtype=dtype)
    inputs = {name: VIEWS[kind](tensor) for (name, tensor), kind in zip(inputs.items(), kinds, strict=True)}
    if mask is not None:
        shape = (batch if mask[0] else 1, heads if mask[1] else 1, queries if mask[2] else 1, keys)
        inputs["mask"] = random_mask(*shape, dtype=torch.bool if boolean else dtype)
    # Of a few elements, which of two errors is larger is chance.
    check(inputs, path=path, slack=1.25 if queries * dim > 2000 else 3.0)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's machinery
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "mask", "dropout", "cu_seqlens"])
def test_opcheck(options):
    mask = random(1, 2, 9, 9).requires_grad_() if options == "mask" else None
    seed = torch.tensor([5], device=DEVICE) if options == "dropout" else None
    bounds, most = (
        (torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE), 9) if options == "cu_seqlens" else (None, None)
    )
    call = (mask, bounds, most, seed, 0.25, 0.5 if seed is not None else 0.0)
    qkv = random(*(() if bounds is not None else (2,)), 9, 3, 2, 16)
    parts = [part.clone().requires_grad_() for part in qkv.unbind(-3)]
    out, lse = kernels._attention(*parts, *call)
    torch.library.opcheck(kernels._attention.definition, (*parts, *call))
    torch.library.opcheck(kernels._attention_packed.definition, (qkv.requires_grad_(), *call))
    detached = [tensor.detach() for tensor in (*parts, out, lse)]
    call = (None if mask is None else mask.detach(), *call[1:], mask is not None)
    torch.library.opcheck(kernels._attention_backward.definition, (torch.ones_like(detached[3]), *detached, *call))
    packed = (torch.ones_like(detached[3]), qkv.detach(), *detached[3:], *call)
    torch.library.opcheck(kernels._attention_packed_backward.definition, packed)


def block(qkv, mask):
    """Both operators, one after the other."""
    out = attention_packed(qkv, num_heads=2, mask=mask)
    query = out.unflatten(-1, (2, -1))
    return attention(query, query, out.unflatten(-1, (2, -1)).detach(), scale=0.2)


def block_results(function, qkv, mask):
    qkv, mask = qkv.detach().requires_grad_(), mask.detach().requires_grad_()
    out = function(qkv, mask)
    return [out, *torch.autograd.grad(out.square().sum(), (qkv, mask))]


def test_compiled_without_a_graph_break():
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second has a dynamic shape
        inputs = random(batch, 9, 96), random(1, 2, 9, 9, seed=1)
        for ours, expected in zip(block_results(compiled, *inputs), block_results(block, *inputs), strict=True):
            torch.testing.assert_close(ours, expected)


def test_compiled_with_dropout_and_pictures_of_different_sizes():
    def function(qkv, bounds):
        return attention_packed(qkv, cu_seqlens=bounds, max_seqlen=12, dropout_p=0.25)

    qkv, bounds = packed_batch([5, 12])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first = compiled(qkv, bounds)
    torch.manual_seed(3)
    assert torch.equal(compiled(qkv, bounds), first)
    assert not torch.equal(compiled(qkv, bounds), first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_activation_checkpointing(dropout_p):
    def function(qkv):
        return attention_packed(qkv, num_heads=2, dropout_p=dropout_p)

    qkv = random(2, 9, 96).requires_grad_()
    grads = []
    for run in (function, lambda qkv: checkpoint(function, qkv, use_reentrant=False)):
        torch.manual_seed(7)
        grads.append(torch.autograd.grad(run(qkv).square().sum(), qkv)[0])
    assert torch.equal(*grads)


def test_export_with_any_batch_size():
    class Block(torch.nn.Module):
        def forward(self, qkv, mask):
            return block(qkv, mask)

    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    mask = random(1, 2, 9, 9, seed=1)
    program = torch.export.export(Block(), (random(2, 9, 96), mask), dynamic_shapes=(batch, None))
    qkv = random(5, 9, 96, seed=8)
    assert torch.equal(program.module()(qkv, mask), block(qkv, mask))


def test_autocast_casts_float32_as_pytorch_does():
    inputs = inputs_of(1, 20, 30, 2, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(**inputs)
        theirs = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in inputs.values()))
        assert theirs.dtype == out.dtype == torch.bfloat16
        assert torch.equal(out, attention(**{name: tensor.bfloat16() for name, tensor in inputs.items()}))
        assert attention_packed(random(1, 5, 96), num_heads=2).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# The maps, and bad input
# ---------------------------------------------------------------------------------------------------------------------


@DTYPES
def test_probabilities_are_exact_but_for_their_own_rounding(dtype):
    inputs = inputs_of(1, 20, 30, 2, 16, dtype=dtype)
    query, key = inputs["query"], inputs["key"]
    for mask in (None, random_mask(1, 1, 20, 30), random(1, 2, 20, 30, seed=5)):
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


def test_probabilities_of_a_row_whose_every_key_is_hidden_are_zeros():
    query = random(1, 4, 1, 16).requires_grad_()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=DEVICE)
    mask[..., 2, :] = False
    probabilities = reference.attention_probabilities(query, query, mask=mask)
    assert probabilities[0, 0, 2].count_nonzero() == 0
    (grad,) = torch.autograd.grad(probabilities.square().sum(), query)
    assert grad.isfinite().all()


BAD = [
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
    ({"dropout_p": 1.5}, "dropout_p: expected a probability, got 1.5"),
    ({"dropout_p": 0.5, "seed": torch.zeros(2).long()}, r"seed: expected \[1\], got \[2\]"),
    ({"dropout_p": 0.5, "seed": torch.zeros(1).int()}, "seed: expected torch.int64, got torch.int32"),
    ({"cu_seqlens": torch.zeros(3).int(), "max_seqlen": 5}, r"query: expected \[tokens, H, D\] with cu_seqlens"),
]
BAD_PACKED = [
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


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_named_before_anything_is_launched(changes, message, monkeypatch):
    monkeypatch.setattr(kernels, "_launch_forward", None)
    inputs = {name: tensor.cpu() for name, tensor in inputs_of(2, 5, 7, 2, 16).items()} | changes
    with pytest.raises(ValueError, match=message):
        attention(**inputs)


@pytest.mark.parametrize(("arguments", "message"), BAD_PACKED)
def test_bad_packed_input_is_named_before_anything_is_launched(arguments, message, monkeypatch):
    monkeypatch.setattr(kernels, "_launch_forward", None)
    with pytest.raises(ValueError, match=message):
        attention_packed(**arguments)
