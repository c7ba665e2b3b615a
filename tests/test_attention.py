"""Attention: as exact as PyTorch's against float64, on a GPU, or interpreted without one."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than, measure_errors, poison_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastvit.ops import reference

pytest.importorskip("triton")
from fastvit.kernels import attention as kernels
from fastvit.kernels import tuning
from fastvit.kernels.attention import attention, attention_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
PATHS = pytest.mark.parametrize("path", ["short", "long"])

# Small tiles, so that small inputs fill several: which kernels run is decided here, whatever the table says.
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
def kernels_of(path):
    """Inside, the kernels for short or for long sequences compute attention."""

    def candidates(operation, *_):
        return (TILES[path, operation],)

    with mock.patch.object(tuning, "find_candidates", candidates):
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


def results(function, inputs, grad_out, *, cast=lambda tensor: tensor, **options):
    """The output and the gradient of every input but the mask, by name."""
    inputs = {
        name: tensor if tensor.dtype == torch.bool else cast(tensor).detach().requires_grad_(name != "mask")
        for name, tensor in inputs.items()
    }
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    out = function(**inputs, **options)
    grads = torch.autograd.grad(out, list(wanted.values()), cast(grad_out))
    return {"out": out.detach()} | {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def grad_for(inputs, seed=7):
    batch, queries, heads, dim = inputs["query"].shape
    return random(batch, queries, heads * dim, dtype=inputs["query"].dtype, seed=seed)


def check(inputs, *, path="short", slack=1.25, worst=4, **options):
    """Output and every gradient against float64, beside PyTorch in the same dtype."""
    grad_out = grad_for(inputs)
    with kernels_of(path), poison_memory():
        ours = results(attention, inputs, grad_out, **options)
    theirs = results(reference.attention, inputs, grad_out, **options)
    exact = results(reference.attention, inputs, grad_out, cast=torch.Tensor.double, **options)
    for name, result in ours.items():
        assert_no_worse_than(result, theirs[name], exact[name], slack=slack, worst=worst, name=f"{path}: {name}")


# ---------------------------------------------------------------------------------------------------------------------
# Exactness
# ---------------------------------------------------------------------------------------------------------------------


@PATHS
@DTYPES
@pytest.mark.parametrize("dim", [16, 24, 48, 64, 72, 80, 88, 96, 112, 128])
def test_outputs_and_gradients_are_as_exact_as_pytorchs(dim, dtype, path):
    check(inputs_of(1, 40, 70, 1, dim, dtype=dtype), path=path)


@DTYPES
@pytest.mark.parametrize(("queries", "keys", "dim"), [(40, 70, 64), (33, 256, 48), (1, 17, 16), (20, 16, 128)])
def test_short_backward_with_the_product_for_queries_transposed(queries, keys, dim, dtype):
    seen = []
    kernel = kernels._attention_bwd_key_value
    launcher = mock.MagicMock()
    launcher.__getitem__.side_effect = lambda grid: (
        lambda *args, **options: (
            seen.append((options["TRANSPOSED"], options["MASKED"])),
            kernel[grid](*args, **options),
        )
    )
    with mock.patch.object(kernels, "_attention_bwd_key_value", launcher):
        check(inputs_of(1, queries, keys, 1, dim, dtype=dtype), path="transposed", slack=1.25 if queries > 5 else 2.0)
    assert seen == [(1, keys not in (16, 256))]


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
    with kernels_of(path), poison_memory():
        ours = results(attention, inputs, grad_for(inputs))
    theirs = results(reference.attention, inputs, grad_for(inputs))
    exact = results(reference.attention, inputs, grad_for(inputs), cast=torch.Tensor.double)
    assert_no_worse_than(ours["out"], theirs["out"], exact["out"], name="out")
    # A score is known to a unit in its last place, and backward, which may add up its products in another order,
    # knows the probabilities to as much.
    unit = torch.finfo(torch.float32).eps * scores.abs().max().item()
    for name, result in ours.items():
        (error, _), (their_error, _) = (measure_errors(found, exact[name]) for found in (result, theirs[name]))
        assert error < 1.25 * their_error + unit, name


@pytest.mark.parametrize("index", range(3))
def test_every_tile_of_the_table(index):
    inputs = inputs_of(1, 40, 197, 1, 32, dtype=torch.bfloat16) | {"mask": random(1, 1, 40, 197, dtype=torch.bfloat16)}
    rules = [rule for rule in tuning.TABLE if rule.operation.startswith("attention") and index < len(rule.candidates)]
    tiles = {(rule.operation, tuple(rule.candidates[index].items())) for rule in rules}
    assert all(len(rule.candidates) <= 3 for rule in rules)
    for operation, tile in sorted(tiles):
        with mock.patch.dict(TILES, {("long", operation): dict(tile)}):
            check(inputs, path="long")


def test_the_kernels_for_short_sequences_are_used_where_they_are_made_for():
    hopper = tuning.Device("an H100", "sm_90", 132)
    with mock.patch.object(tuning, "describe_device", lambda _: hopper):
        for programs, keys, mask, short in [
            (256 * 12, 197, None, True),
            (256 * 12, 257, None, False),
            (12, 197, None, False),
            (256 * 12, 197, torch.zeros(1), False),
        ]:
            shape_class = kernels._describe_shape(programs, keys, 64, mask)
            for operation, mark in (("attention_forward", "piece"), ("attention_backward", "keys_per_warp")):
                first = tuning.select(operation, shape_class, torch.bfloat16, torch.device("cpu"), 0)
                assert (mark in first) == short, (operation, shape_class)


def test_the_candidate_that_is_asked_for_runs_in_both_directions():
    asked = []

    def candidate(operation, shape, dtype, device, number):
        asked.append((operation, number))
        return TILES["long", operation]

    inputs = inputs_of(1, 20, 20, 1, 16)
    with mock.patch.object(tuning, "select", candidate):
        results(attention, inputs, grad_for(inputs), candidate=2)
        qkv = random(1, 20, 3, 1, 16).requires_grad_()
        attention_packed(qkv, candidate=1).sum().backward()
    both = ["attention_forward", "attention_backward"]
    assert asked == [(operation, number) for number in (2, 1) for operation in both]


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
def test_additive_masks(shape, dtype, path):
    check(inputs_of(2, 40, 70, 2, 16, dtype=dtype) | {"mask": random_mask(*shape, dtype=dtype)}, path=path)


def test_a_mask_that_is_the_same_for_all_keys_changes_nothing():
    inputs = inputs_of(2, 40, 70, 2, 16)
    torch.testing.assert_close(attention(**inputs, mask=random(2, 1, 40, 1, seed=5)), attention(**inputs))


def test_a_mask_without_its_gradient_may_require_one():
    inputs = inputs_of(2, 20, 30, 2, 16)
    mask = random(1, 1, 20, 30, seed=5)
    with torch.no_grad():
        assert torch.equal(attention(**inputs, mask=mask.clone().requires_grad_()), attention(**inputs, mask=mask))


def test_a_float32_mask_beside_half_precision():
    inputs = inputs_of(1, 20, 30, 2, 16, dtype=torch.bfloat16)
    mask = random(1, 2, 20, 30, seed=5)
    rounded = attention(**inputs, mask=mask.bfloat16())
    assert torch.equal(attention(**inputs, mask=mask.bfloat16().float()), rounded)
    assert not torch.equal(attention(**inputs, mask=mask), rounded)


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
    with kernels_of(path), poison_memory():
        ours = results(attention, inputs | {"mask": mask}, grad_for(inputs))
    theirs = results(reference.attention, inputs | {"mask": shown}, grad_for(inputs))
    for name in ("out", "grad query"):
        assert ours[name][0, 3].count_nonzero() == 0
        assert ours[name][1, 33:].count_nonzero() == 0
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# The packed form, images of different sizes, the class token
# ---------------------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_gives_the_bits_of_separate_and_one_gradient(dtype, path):
    qkv = random(2, 40, 3, 2, 48, dtype=dtype).requires_grad_()
    grad_out = random(2, 40, 96, dtype=dtype, seed=1)
    with kernels_of(path), poison_memory():
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
    """Tokens of images one after the other [tokens, 3, H, D], and where each image begins."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return random(sum(lengths), 3, heads, dim, dtype=dtype), bounds


@PATHS
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_images_of_different_sizes_give_what_each_gives_alone(path, masked):
    lengths = [17, 50, 1, 0, 33]
    qkv, bounds = packed_batch(lengths, dtype=torch.bfloat16)
    grad_out = random(len(qkv), 64, dtype=torch.bfloat16, seed=1)
    mask = random(5, 2, 50, 50, dtype=torch.bfloat16, seed=2) if masked else None
    with kernels_of(path), poison_memory():
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
            # Not the same bits: the tile of a larger image sums in another order.
            close = {"atol": 1e-2, "rtol": 1.6e-2}
            torch.testing.assert_close(out[here], expected[0], **close)
            torch.testing.assert_close(grad[here], expected_grad[0], **close)
            first += length


@PATHS
def test_bounds_with_a_stride(path):
    qkv, bounds = packed_batch([17, 9, 30, 31])
    with kernels_of(path):
        strided = attention_packed(qkv, cu_seqlens=torch.stack([bounds, bounds], 1)[:, 0], max_seqlen=31)
        assert torch.equal(strided, attention_packed(qkv, cu_seqlens=bounds, max_seqlen=31))


@PATHS
@pytest.mark.parametrize(("lengths", "most"), [((17, 9), 17), ((20, 10), 12), ((), 5)], ids=["few", "cut off", "none"])
def test_tokens_of_no_image_give_zeros(path, lengths, most):
    qkv, _ = packed_batch([40])
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    owned = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    for first, length in zip(bounds.tolist(), lengths, strict=False):
        owned[first : first + min(length, most)] = True
    with kernels_of(path), poison_memory():
        out = attention_packed(qkv.requires_grad_(), cu_seqlens=bounds, max_seqlen=most)
        (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out.isfinite().all()
    assert grad.isfinite().all()
    for tensor in (out, grad):
        assert tensor[~owned].count_nonzero() == 0
        assert tensor[owned].flatten(1).any(1).all()


@pytest.mark.parametrize("bounds", [[1, 9], [0, 5, 4, 10], [0, 11], [-1, 10]], ids=str)
def test_bounds_that_cannot_be_are_refused_on_a_cpu(bounds):
    qkv, _ = packed_batch([10])
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected 0, then no less than the one before, up to 10, got \["):
        attention_packed(qkv.cpu(), cu_seqlens=bounds, max_seqlen=10)


@PATHS
@pytest.mark.parametrize(
    "bounds", [[0, 7, 50], [3, -5, 10], [8, 2**31 - 1], [-(2**31), 4], [12, 40], [9, 3, 10]], ids=str
)
def test_no_bounds_lead_beyond_the_tokens(bounds, path, monkeypatch):
    """As on a GPU, where their values are not looked at. Interpreted, an address outside of its tensor is seen by what
    lies there: NaN in what is read, and another number than before where nothing may be written."""
    monkeypatch.setattr(kernels, "_check_bounds", lambda cu_seqlens, tokens: cu_seqlens)
    around = torch.full((200, 3, 2, 16), float("nan"), device=DEVICE)
    qkv = around[100:110]
    qkv.copy_(random(10, 3, 2, 16))
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
    with kernels_of(path):
        out, lse = kernels._launch_forward(*qkv.unbind(-3), *call)
        grad = new_inside(qkv, qkv.shape, None)
        kernels._launch_backward(torch.ones_like(out), *qkv.unbind(-3), out, lse, grad.unbind(-3), *call)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    for whole in sums:
        assert (whole[:100] == 7).all()
        assert (whole[110:] == 7).all()


@PATHS
def test_images_of_one_size_give_the_bits_of_a_batch(path):
    qkv, bounds = packed_batch([33, 33])
    with kernels_of(path):
        packed = attention_packed(qkv, cu_seqlens=bounds, max_seqlen=33)
        assert torch.equal(packed, attention_packed(qkv.unflatten(0, (2, 33))).flatten(0, 1))


def test_the_reference_agrees_about_images_of_different_sizes():
    qkv, bounds = packed_batch([17, 9, 30])
    mask = random_mask(1, 2, 30, 30)
    for options in ({}, {"mask": mask}, {"cu_seqlens": bounds[:2]}, {"cu_seqlens": bounds[:1]}):
        options = {"cu_seqlens": bounds, "max_seqlen": 30, **options}
        torch.testing.assert_close(attention_packed(qkv, **options), reference.attention_packed(qkv, **options))


def test_the_class_token_alone_gives_its_row_of_all_tokens():
    inputs = inputs_of(2, 50, 50, 2, 64)
    whole = attention(**inputs)
    alone = attention(inputs["query"][:, :1], inputs["key"], inputs["value"])
    torch.testing.assert_close(alone, whole[:, :1])


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
        assert (kernels._make_readable(tensor).data_ptr() == tensor.data_ptr()) == (kind != "every other column")
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
def test_nan_reaches_the_gradients_of_its_own_image_alone(bad):
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
    assert attention(**inputs, mask=random(1, 1, 5, 7)).numel() == 0
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
def test_an_image_does_not_depend_on_those_beside_it(path):
    inputs = inputs_of(3, 40, 40, 2, 16, dtype=torch.bfloat16)
    with kernels_of(path):
        whole = attention(**inputs)
        assert torch.equal(attention(**{name: tensor[1:2] for name, tensor in inputs.items()}), whole[1:2])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(8, 40), st.integers(8, 70), st.integers(1, 2)),
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
    is_large = queries * dim > 10_000
    check(inputs, path=path, slack=1.25 if is_large else 3.0, worst=4 if is_large else 6)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's machinery
# ---------------------------------------------------------------------------------------------------------------------


FALLBACK_CASES = ["", "boolean mask", "additive mask", "cu_seqlens", "cu_seqlens and mask", "hidden row", "other keys"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FALLBACK_CASES)
def test_the_fallback_agrees_with_the_kernels(case, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_FALLBACK_SCORES", 2 * 9 * 9)  # one image at a time
    queries = 5 if case == "other keys" else 9
    mask = bounds = most = None
    shape = (3, 9)
    if "cu_seqlens" in case:  # 27 tokens: the second image is cut off, the last tokens belong to none
        bounds, most, shape = torch.tensor([0, 4, 16, 25], dtype=torch.int32, device=DEVICE), 9, (27,)
        mask = random(1, 2, 9, 9) if "mask" in case else None
    elif "mask" in case:
        mask = random_mask(3, 1, 9, 9, dtype=torch.bool if case == "boolean mask" else dtype)
    elif case == "hidden row":
        mask = torch.zeros(1, 1, 9, 9, device=DEVICE)
        mask[..., 2, :] = float("-inf")
    qkv = random(*shape, 3, 2, 16, dtype=dtype)
    query, key, value = qkv.unbind(-3)
    query = query[:, :queries] if bounds is None else query
    options = (mask, bounds, most, 0.3, 0)
    ours = kernels._attention(query, key, value, *options)
    grad_out = random(*ours[0].shape, dtype=dtype, seed=4)
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
    mask = random(1, 2, 9, 9) if options == "mask" else None
    bounds, most = (
        (torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE), 9) if options == "cu_seqlens" else (None, None)
    )
    call = (mask, bounds, most, 0.25, 0)
    qkv = random(*(() if bounds is not None else (2,)), 9, 3, 2, 16)
    parts = [part.clone().requires_grad_() for part in qkv.unbind(-3)]
    out, lse = kernels._attention(*parts, *call)
    torch.library.opcheck(kernels._attention, (*parts, *call))
    torch.library.opcheck(kernels._attention_packed, (qkv.requires_grad_(), *call))
    detached = [tensor.detach() for tensor in (*parts, out, lse)]
    torch.library.opcheck(kernels._attention_backward, (torch.ones_like(detached[3]), *detached, *call))
    packed = (torch.ones_like(detached[3]), qkv.detach(), *detached[3:], *call)
    torch.library.opcheck(kernels._attention_packed_backward, packed)


def block(qkv, mask):
    """Both operators, one after the other."""
    out = attention_packed(qkv, num_heads=2, mask=mask)
    query = out.unflatten(-1, (2, -1))
    return attention(query, query, out.unflatten(-1, (2, -1)).detach(), scale=0.2)


def block_results(function, qkv, mask):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, mask)
    return [out, *torch.autograd.grad(out.square().sum(), qkv)]


def test_compiled_without_a_graph_break():
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second has a dynamic shape
        inputs = random(batch, 9, 96), random(1, 2, 9, 9, seed=1)
        for ours, expected in zip(block_results(compiled, *inputs), block_results(block, *inputs), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_with_images_of_different_sizes(autocast):
    def function(qkv, bounds):
        return attention_packed(qkv, cu_seqlens=bounds, max_seqlen=12)

    qkv, bounds = packed_batch([5, 12])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        assert torch.equal(compiled(qkv, bounds), function(qkv, bounds))


def test_activation_checkpointing():
    def function(qkv):
        return attention_packed(qkv, num_heads=2)

    qkv = random(2, 9, 96).requires_grad_()
    grads = []
    for run in (function, lambda qkv: checkpoint(function, qkv, use_reentrant=False)):
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
    ({"mask": torch.zeros(5, 7).requires_grad_()}, "mask: expected one that requires no gradient"),
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
    monkeypatch.setattr(kernels, "_attention", None)
    inputs = {name: tensor.cpu() for name, tensor in inputs_of(2, 5, 7, 2, 16).items()} | changes
    with pytest.raises(ValueError, match=message):
        attention(**inputs)


@pytest.mark.parametrize(("arguments", "message"), BAD_PACKED)
def test_bad_packed_input_is_named_before_anything_is_launched(arguments, message, monkeypatch):
    monkeypatch.setattr(kernels, "_attention_packed", None)
    with pytest.raises(ValueError, match=message):
        attention_packed(**arguments)
