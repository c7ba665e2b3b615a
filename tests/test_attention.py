"""Attention: its error against float64 is no larger than PyTorch's, on a GPU or in the interpreter."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than, measure_errors, poison_memory
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from attention_inputs import (
    DTYPES,
    LOOP,
    PAIR,
    PATHS,
    TILES,
    check,
    compute_results,
    make_grad_out,
    make_inputs,
    make_mask,
    make_packed,
    use_kernels,
)
from operations import DEVICE, randn

from fastvit.kernels import attention as kernels
from fastvit.kernels import tuning
from fastvit.kernels.attention import attention, attention_packed
from fastvit.ops import reference

# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------


@PATHS
@DTYPES
@pytest.mark.parametrize("dim", [16, 24, 48, 64, 72, 80, 88, 96, 112, 128])
def test_outputs_and_gradients_match_reference(dim, dtype, path):
    check(make_inputs(1, 40, 70, 1, dim, dtype=dtype), path=path)


@DTYPES
@pytest.mark.parametrize(("queries", "keys", "dim"), [(40, 70, 64), (33, 256, 48), (1, 17, 16), (20, 16, 128)])
def test_short_backward_with_transposed_query_matmul(queries, keys, dim, dtype):
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
        check(make_inputs(1, queries, keys, 1, dim, dtype=dtype), path="transposed", slack=1.25 if queries > 5 else 2.0)
    assert seen == [(1, keys not in (16, 256))]


@PATHS
@pytest.mark.parametrize("tokens", [1, 17, 50, 197, 256])
def test_any_number_of_tokens(tokens, path):
    check(make_inputs(1, tokens, tokens, 1, 16, dtype=torch.bfloat16), path=path)


@pytest.mark.parametrize("tokens", [257, 577, 785, 1025])
def test_many_tokens(tokens):
    tile = {"rows": 128, "keys": 128}
    pair = PAIR | tile | {"key_value_rows": 128, "key_value_keys": 128}
    larger = {("long", "attention_forward"): LOOP | tile, ("long", "attention_backward"): pair}
    with mock.patch.dict(TILES, larger):
        check(make_inputs(1, tokens, tokens, 1, 16, dtype=torch.bfloat16), path="long")


@PATHS
@pytest.mark.parametrize(("queries", "keys"), [(1, 197), (50, 17), (5, 130)])
def test_cross_attention_matches_reference(queries, keys, path):
    # All elements of a row share the rounding of its log-sum-exp: with few rows, either error may be the larger.
    slack = 1.25 if queries > 5 else 2.0
    check(make_inputs(2, queries, keys, 2, 32, dtype=torch.bfloat16), path=path, slack=slack)
    check(make_inputs(2, queries, keys, 2, 32), path=path, slack=slack)


@PATHS
def test_single_key_returns_its_value(path):
    inputs = make_inputs(2, 70, 1, 2, 32)
    with use_kernels(path):
        found = compute_results(attention, inputs, make_grad_out(inputs))
    torch.testing.assert_close(found["out"], inputs["value"].flatten(2).expand(-1, 70, -1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["grad value"].flatten(2), make_grad_out(inputs).sum(1, keepdim=True))
    for name in ("grad query", "grad key"):
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]), rtol=0, atol=1e-4)


@PATHS
def test_custom_scale(path):
    check(make_inputs(1, 20, 30, 2, 32), path=path, scale=0.3)


@PATHS
@DTYPES
def test_scores_of_ten_thousand(dtype, path):
    inputs = make_inputs(1, 40, 70, 1, 64, dtype=dtype, scale=100.0)
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs["query"].float(), inputs["key"].float()) / 8
    assert scores.max() > 1e4
    assert scores.min() < -1e4
    with use_kernels(path), poison_memory():
        ours = compute_results(attention, inputs, make_grad_out(inputs))
    theirs = compute_results(reference.attention, inputs, make_grad_out(inputs))
    exact = compute_results(reference.attention, inputs, make_grad_out(inputs), cast=torch.Tensor.double)
    assert_no_worse_than(ours["out"], theirs["out"], exact["out"], name="out")
    # A score is exact to one unit in the last place. Backward recomputes it, possibly in another order of summation, so
    # its probabilities are no more exact than that.
    unit = torch.finfo(torch.float32).eps * scores.abs().max().item()
    for name, result in ours.items():
        (error, _), (their_error, _) = (measure_errors(found, exact[name]) for found in (result, theirs[name]))
        assert error < 1.25 * their_error + unit, name


@pytest.mark.parametrize("index", range(3))
def test_every_tile_of_the_tuning_table(index):
    inputs = make_inputs(1, 40, 197, 1, 32, dtype=torch.bfloat16) | {"mask": randn(1, 1, 40, 197, dtype=torch.bfloat16)}
    rules = [rule for rule in tuning.TABLE if rule.operation.startswith("attention") and index < len(rule.candidates)]
    tiles = {(rule.operation, tuple(rule.candidates[index].items())) for rule in rules}
    assert all(len(rule.candidates) <= 3 for rule in rules)
    for operation, tile in sorted(tiles):
        with mock.patch.dict(TILES, {("long", operation): dict(tile)}):
            check(inputs, path="long")


def test_short_sequences_select_the_short_kernels():
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


def test_requested_candidate_is_used_in_forward_and_backward():
    requested = []

    def candidate(operation, shape, dtype, device, number):
        requested.append((operation, number))
        return TILES["long", operation]

    inputs = make_inputs(1, 20, 20, 1, 16)
    with mock.patch.object(tuning, "select", candidate):
        compute_results(attention, inputs, make_grad_out(inputs), candidate=2)
        qkv = randn(1, 20, 3, 1, 16).requires_grad_()
        attention_packed(qkv, candidate=1).sum().backward()
    both = ["attention_forward", "attention_backward"]
    assert requested == [(operation, number) for number in (2, 1) for operation in both]


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------

MASK_SHAPES = [(1, 70), (40, 70), (2, 1, 1, 70), (1, 2, 40, 70), (2, 2, 40, 70)]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_boolean_masks(shape, dtype, path):
    check(make_inputs(2, 40, 70, 2, 16, dtype=dtype) | {"mask": make_mask(*shape)}, path=path)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_additive_masks(shape, dtype, path):
    check(make_inputs(2, 40, 70, 2, 16, dtype=dtype) | {"mask": make_mask(*shape, dtype=dtype)}, path=path)


def test_mask_constant_over_keys_changes_nothing():
    inputs = make_inputs(2, 40, 70, 2, 16)
    torch.testing.assert_close(attention(**inputs, mask=randn(2, 1, 40, 1, seed=5)), attention(**inputs))


def test_mask_may_require_grad_under_no_grad():
    inputs = make_inputs(2, 20, 30, 2, 16)
    mask = randn(1, 1, 20, 30, seed=5)
    with torch.no_grad():
        assert torch.equal(attention(**inputs, mask=mask.clone().requires_grad_()), attention(**inputs, mask=mask))


def test_float32_mask_with_half_precision_inputs():
    inputs = make_inputs(1, 20, 30, 2, 16, dtype=torch.bfloat16)
    mask = randn(1, 2, 20, 30, seed=5)
    rounded = attention(**inputs, mask=mask.bfloat16())
    assert torch.equal(attention(**inputs, mask=mask.bfloat16().float()), rounded)
    assert not torch.equal(attention(**inputs, mask=mask), rounded)


@PATHS
@pytest.mark.parametrize("kind", ["boolean", "minus infinity", "lowest"])
def test_fully_masked_rows_are_zero(kind, path):
    inputs = make_inputs(2, 40, 70, 2, 16)
    shown = make_mask(2, 1, 40, 70)
    shown[0, :, 3] = False
    shown[1, :, 33:] = False
    mask = shown
    if kind != "boolean":
        hidden = float("-inf") if kind == "minus infinity" else torch.finfo(torch.float32).min
        mask = torch.zeros(shown.shape, device=DEVICE).masked_fill(~shown, hidden)
    with use_kernels(path), poison_memory():
        ours = compute_results(attention, inputs | {"mask": mask}, make_grad_out(inputs))
    theirs = compute_results(reference.attention, inputs | {"mask": shown}, make_grad_out(inputs))
    for name in ("out", "grad query"):
        assert ours[name][0, 3].count_nonzero() == 0
        assert ours[name][1, 33:].count_nonzero() == 0
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# Strides, offsets, empty and non-finite inputs
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
def test_views_are_read_without_copies(kind, path):
    inputs = make_inputs(2, 20, 40, 2, 16)
    if kind == "one head for all":
        inputs["key"] = inputs["key"][:, :, :1].expand(-1, -1, 2, -1)
    views = {name: VIEWS[kind](tensor) for name, tensor in inputs.items()}
    grad_out = make_grad_out(inputs)
    for tensor in views.values():
        assert (kernels._make_readable(tensor).data_ptr() == tensor.data_ptr()) == (kind != "every other column")
    with use_kernels(path):
        expected = compute_results(attention, {name: tensor.contiguous() for name, tensor in inputs.items()}, grad_out)
        for name, result in compute_results(
            attention, views, VIEWS["batch second"](grad_out[..., None])[..., 0]
        ).items():
            assert torch.equal(result, expected[name]), name


@PATHS
def test_expanded_output_gradients_match_contiguous(path):
    inputs = make_inputs(2, 20, 40, 2, 16)
    one = torch.ones((), device=DEVICE)
    with use_kernels(path):
        expanded = compute_results(attention, inputs, one.expand(2, 20, 32))
        for name, result in compute_results(attention, inputs, torch.ones(2, 20, 32, device=DEVICE)).items():
            assert torch.equal(result, expanded[name]), name


def test_elements_beyond_int32_offsets_are_addressed():
    inputs = make_inputs(2, 3, 3, 1, 16, dtype=torch.float16)
    storage = torch.UntypedStorage(2**32 + 2**12, device=DEVICE)  # untouched pages take no physical memory
    for strides in [(2**31, 16, 16, 1), (16, 2**30, 16, 1)]:
        far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage).as_strided((2, 3, 1, 16), strides)
        if strides[1] > 16:
            far = far[:, :2]
        far.copy_(inputs["key"][:, : far.shape[1]])
        near = {name: tensor[:, : far.shape[1]] for name, tensor in inputs.items()}
        for path in ("short", "long"):
            with use_kernels(path):
                assert torch.equal(attention(near["query"], far, near["value"]), attention(**near))


@PATHS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_and_inf_propagate_as_in_pytorch(name, bad, path):
    inputs = make_inputs(2, 20, 40, 1, 16)
    inputs[name][1, 7, 0, 3] = bad
    with use_kernels(path):
        ours = attention(**inputs)
    theirs = F.scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in inputs.values())).transpose(1, 2)
    assert torch.equal(ours.isnan(), theirs.flatten(2).isnan())
    assert torch.equal(ours.isinf(), theirs.flatten(2).isinf())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_only_reaches_gradients_of_its_own_image(bad):
    inputs = make_inputs(2, 20, 40, 1, 16)
    inputs["value"][1, 7, 0, 3] = bad
    for path in ("short", "long"):
        with use_kernels(path):
            for name, grad in compute_results(attention, inputs, make_grad_out(inputs)).items():
                assert grad[0].isfinite().all(), name
                if name in ("grad query", "grad key"):
                    assert not grad[1].isfinite().any(), name


@pytest.mark.parametrize("shape", [(0, 5, 7, 2, 16), (2, 5, 7, 0, 16)])
def test_empty_batch_returns_empty_results(shape):
    inputs = make_inputs(*shape)
    for name, result in compute_results(attention, inputs, make_grad_out(inputs)).items():
        assert result.numel() == 0, name
    assert attention(**inputs, mask=randn(1, 1, 5, 7)).numel() == 0
    qkv, bounds = make_packed([0, 0])
    assert attention_packed(qkv, cu_seqlens=bounds, max_seqlen=4).shape == (0, 64)


@PATHS
def test_results_are_deterministic(path):
    inputs = make_inputs(2, 70, 90, 2, 16, dtype=torch.bfloat16) | {"mask": randn(1, 1, 70, 90, dtype=torch.bfloat16)}
    with use_kernels(path):
        first, second = (compute_results(attention, inputs, make_grad_out(inputs)) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@PATHS
def test_images_of_a_batch_are_independent(path):
    inputs = make_inputs(3, 40, 40, 2, 16, dtype=torch.bfloat16)
    with use_kernels(path):
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
    inputs = make_inputs(batch, queries, keys, heads, dim, dtype=dtype)
    inputs = {name: VIEWS[kind](tensor) for (name, tensor), kind in zip(inputs.items(), kinds, strict=True)}
    if mask is not None:
        shape = (batch if mask[0] else 1, heads if mask[1] else 1, queries if mask[2] else 1, keys)
        inputs["mask"] = make_mask(*shape, dtype=torch.bool if boolean else dtype)
    # With few elements, either of the two errors may be the larger by chance.
    is_large = queries * dim > 10_000
    check(inputs, path=path, slack=1.25 if is_large else 3.0, worst=4 if is_large else 6)
