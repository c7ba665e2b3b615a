"""LayerNorm and add + LayerNorm: errors against float64 are no larger than PyTorch's, on a GPU or interpreted."""

import pytest
import torch
from accuracy import assert_no_worse_than, poison_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastvit.ops import reference

pytest.importorskip("triton")
from operations import DEVICE, EPS, assert_close, randn

from fastvit.kernels import layer_norm as kernels
from fastvit.kernels import operators
from fastvit.kernels.layer_norm import add_layer_norm, layer_norm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


def make_inputs(
    *shape, dtype=torch.float32, residual_dtype=None, weight_dtype=None, scales=False, scale=1.0, shift=0.0
):
    """Return inputs by name. The affine weights are random: ones and zeros would hide a missing factor or term."""
    dim, weight_dtype = shape[-1], weight_dtype or dtype
    inputs = {
        "x": randn(*shape, dtype=dtype, seed=1, scale=scale, shift=shift),
        "residual": randn(*shape, dtype=residual_dtype or dtype, seed=2, scale=scale),
        "weight": randn(dim, dtype=weight_dtype, seed=3, scale=0.5, shift=1.0),
        "bias": randn(dim, dtype=weight_dtype, seed=4),
    }
    if scales:
        inputs["scale"] = randn(dim, dtype=weight_dtype, seed=5)
        inputs["row_scale"] = (randn(shape[0], seed=6) > 0).float() / 0.5
    return inputs


def reference_add_layer_norm(x, residual, weight, bias, eps, scale=None, row_scale=None):
    """The definition in the dtype of the sum, because PyTorch's LayerNorm accepts a single dtype."""
    dtype = torch.result_type(x, residual)
    x, residual, weight, bias = (tensor.to(dtype) for tensor in (x, residual, weight, bias))
    scale = None if scale is None else scale.to(dtype)
    return reference.add_layer_norm(x, residual, weight, bias, eps, scale=scale, row_scale=row_scale)


def apply_layer_norm(x, residual, weight, bias, eps):
    return (layer_norm(x, weight, bias, eps),)


def reference_layer_norm(x, residual, weight, bias, eps):
    return (reference.layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), eps),)


def compute_results(function, inputs, grads=None, cast=lambda tensor: tensor):
    """Return outputs and gradients by name. `grads` has one entry for each output, None for an unused one."""
    inputs = {name: cast(tensor).detach().requires_grad_(name != "row_scale") for name, tensor in inputs.items()}
    outputs = function(**inputs, eps=EPS)
    used = [(output, cast(grad)) for output, grad in zip(outputs, grads or (), strict=False) if grad is not None]
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    if used:
        leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        found = torch.autograd.grad(
            [output for output, _ in used], list(leaves.values()), [grad for _, grad in used], allow_unused=True
        )
        named |= {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    return named


def make_grads(shape, dtype, count):
    return [randn(*shape, dtype=dtype, seed=7 + index) for index in range(count)]


def check(inputs, only=("add", "plain")):
    """Compare both operations' errors against float64, in outputs and gradients, with PyTorch's in the same dtypes."""
    shape = inputs["x"].shape
    scaled = "scale" in inputs
    for ours, theirs in ((add_layer_norm, reference_add_layer_norm), (apply_layer_norm, reference_layer_norm)):
        kind = "plain" if ours is apply_layer_norm else "add"
        if kind not in only or (scaled and kind == "plain"):
            continue
        dtype = inputs["x"].dtype if kind == "plain" else torch.result_type(inputs["x"], inputs["residual"])
        grads = make_grads(shape, dtype, 1 if kind == "plain" else 2)
        with poison_memory():
            our_results = compute_results(ours, inputs, grads)
        their_results = compute_results(theirs, inputs, grads)
        exact = compute_results(theirs, inputs, grads, cast=torch.Tensor.double)
        assert our_results.keys() == their_results.keys()
        for name, result in our_results.items():
            assert_no_worse_than(result, their_results[name], exact[name], name=f"{kind} {name}")


@DTYPES
@pytest.mark.parametrize("dim", [1, 5, 48, 96, 192, 384, 768, 1000, 1280])
def test_outputs_and_gradients_match_reference(dim, dtype):
    check(make_inputs(2, 9, dim, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 17, 50, 197, 256, 257, 577, 785])
def test_any_number_of_tokens(tokens):
    check(make_inputs(1, tokens, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 2, 7), (1, 1, 1)])
def test_any_number_of_dimensions(shape):
    check(make_inputs(*shape))


def test_widest_supported_rows_match_reference():
    check(make_inputs(3, kernels.MAX_DIM, dtype=torch.bfloat16))
    check(make_inputs(3, kernels.MAX_DIM), only=("add",))


@DTYPES
def test_layer_scale_and_drop_path_match_reference(dtype):
    check(make_inputs(5, 6, 72, dtype=dtype, scales=True))
    inputs = make_inputs(5, 6, 72, dtype=dtype, scales=True)
    for left_out in ("scale", "row_scale"):
        check({name: tensor for name, tensor in inputs.items() if name != left_out}, only=("add",))


def test_dropped_branch_leaves_the_residual_and_has_zero_gradient():
    inputs = make_inputs(3, 4, 32, scales=True) | {"row_scale": torch.tensor([2.0, 0.0, 1.0], device=DEVICE)}
    found = compute_results(add_layer_norm, inputs, make_grads((3, 4, 32), torch.float32, 2))
    assert torch.equal(found["output 0"][1], inputs["residual"][1])
    assert found["grad x"][1].count_nonzero() == 0
    assert found["grad x"][0].count_nonzero() > 0


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),  # autocast
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
def test_mixed_dtypes(dtype, residual_dtype, weight_dtype, scales):
    check(make_inputs(2, 9, 48, dtype=dtype, residual_dtype=residual_dtype, weight_dtype=weight_dtype, scales=scales))


@pytest.mark.parametrize(
    ("dtype", "scale", "shift"),
    [
        (torch.float32, 1e15, 0.0),
        (torch.float32, 1e-15, 0.0),
        (torch.float32, 1.0, 1e4),
        (torch.bfloat16, 1e15, 0.0),
        (torch.bfloat16, 1e-15, 0.0),
        (torch.bfloat16, 1.0, 100.0),
        (torch.float16, 1e4, 0.0),
        (torch.float16, 1e-6, 0.0),
    ],
)
def test_huge_and_tiny_magnitudes(dtype, scale, shift):
    check(make_inputs(2, 9, 192, dtype=dtype, scale=scale, shift=shift))


@DTYPES
def test_constant_rows_return_the_bias(dtype):
    inputs = make_inputs(4, 96, dtype=dtype)
    equal = torch.tensor([0.0, 1.0, -3.0, 1000.0], device=DEVICE, dtype=dtype)
    inputs["x"] = equal[:, None].expand(4, 96).contiguous()
    assert torch.equal(layer_norm(inputs["x"], inputs["weight"], inputs["bias"], EPS), inputs["bias"].expand(4, 96))
    inputs["residual"] = torch.zeros_like(inputs["x"])
    check(inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@DTYPES
def test_nan_and_inf_propagate_as_in_pytorch(dtype, bad):
    inputs = make_inputs(3, 40, dtype=dtype)
    inputs["x"][1, 7] = bad
    ours = compute_results(add_layer_norm, inputs, make_grads((3, 40), dtype, 2))
    theirs = compute_results(reference_add_layer_norm, inputs, make_grads((3, 40), dtype, 2))
    for name, result in ours.items():
        assert torch.equal(result.isfinite(), theirs[name].isfinite()), name
        assert torch.equal(result.isinf(), theirs[name].isinf()), name


def make_view(kind, shape, dtype):
    """Return a non-contiguous tensor of this shape [B, N, D], with the same values for every kind."""
    batch, tokens, dim = shape
    large = torch.full((batch + 1, tokens + 2, 2 * dim + 3), float("nan"), device=DEVICE, dtype=dtype)
    view = {
        "tokens": lambda: large[:batch, 1:-1].as_strided(shape, (large.stride(0), large.stride(1), 1)),
        "columns": lambda: large[1:, 2:, 3 : dim + 3],
        "every_other_token": lambda: large.new_empty(batch, 2 * tokens, dim)[:, ::2],
        "transposed": lambda: large.new_empty(tokens, batch, dim).transpose(0, 1),
        "every_other_column": lambda: large[1:, 2:, 3::2],
        "columns_first": lambda: large.new_empty(batch, dim, tokens).transpose(1, 2),
    }[kind]()
    return view.copy_(randn(*shape, dtype=dtype, seed=11))


STRIDED = ("tokens", "columns", "every_other_token", "transposed")
COPIED = ("every_other_column", "columns_first")


@pytest.mark.parametrize("kind", STRIDED + COPIED)
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
def test_views_match_contiguous_inputs(kind, scales):
    inputs = make_inputs(3, 5, 24, scales=scales)
    view = make_view(kind, (3, 5, 24), torch.float32)
    grads = make_grads((3, 5, 24), torch.float32, 2)
    functions = (add_layer_norm,) if scales else (add_layer_norm, apply_layer_norm)
    for function in functions:
        for name in ("x", "residual"):
            expected = compute_results(function, inputs | {name: view.contiguous()}, grads)
            strided = compute_results(function, inputs | {name: view}, [make_view_like(grads[0], kind), grads[1]])
            for key, tensor in strided.items():
                assert torch.equal(tensor, expected[key]), (function.__name__, name, key)


def make_view_like(tensor, kind):
    return make_view(kind, tensor.shape, tensor.dtype).copy_(tensor)


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_rows_are_not_copied(kind):
    view = make_view(kind, (3, 5, 24), torch.float32)
    _, (rows,), _ = kernels._view_rows(view, per_sample=False)
    assert rows.data_ptr() == view.data_ptr()


def test_class_tokens_are_read_without_a_copy():
    tokens = randn(4, 17, 48)
    _, (rows,), strides = kernels._view_rows(tokens[:, :1], per_sample=False)
    assert rows.data_ptr() == tokens.data_ptr()
    assert strides[0] == 17 * 48
    weight, bias = randn(48, seed=1), randn(48, seed=2)
    assert torch.equal(layer_norm(tokens[:, :1], weight, bias, EPS), layer_norm(tokens, weight, bias, EPS)[:, :1])


def test_expanded_output_gradients_match_contiguous():
    inputs = make_inputs(2, 3, 16)
    one = torch.ones((), device=DEVICE)
    expanded = compute_results(add_layer_norm, inputs, [one.expand(2, 3, 16), one.expand(2, 3, 16)])
    for name, tensor in compute_results(add_layer_norm, inputs, [torch.ones(2, 3, 16, device=DEVICE)] * 2).items():
        assert torch.equal(tensor, expanded[name]), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 130)),
    kind=st.sampled_from(("contiguous", *STRIDED, *COPIED)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    residual_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scales=st.booleans(),
)
def test_any_shape_layout_and_dtype(shape, kind, dtype, residual_dtype, scales):
    inputs = make_inputs(*shape, dtype=dtype, residual_dtype=residual_dtype, weight_dtype=torch.float32, scales=scales)
    if kind != "contiguous":
        inputs["x"] = make_view(kind, shape, dtype)
    check(inputs, only=("add",))


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24), (0, 24)])
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
def test_empty_batch_returns_empty_outputs_and_zero_weight_gradients(shape, scales):
    inputs = make_inputs(*shape, scales=scales)
    with poison_memory():
        found = compute_results(add_layer_norm, inputs, make_grads(shape, torch.float32, 2))
    assert found["output 0"].shape == found["output 1"].shape == found["grad x"].shape == shape
    for name in ("weight", "bias", "scale") if scales else ("weight", "bias"):
        assert torch.equal(found[f"grad {name}"], torch.zeros(24, device=DEVICE)), name
    if not scales:
        assert layer_norm(inputs["x"], inputs["weight"], inputs["bias"], EPS).shape == shape


@pytest.mark.parametrize("shape", [(2, 5, 24), (24,)])
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_fallbacks_match_kernels(shape, scales, dtypes, monkeypatch):
    """The operators run with failing kernels, so autograd and the shapes and dtypes of the fakes are tested too."""
    inputs = make_inputs(*shape, dtype=dtypes[0], residual_dtype=dtypes[1], weight_dtype=dtypes[1], scales=scales)
    if len(shape) == 1 and scales:
        inputs["row_scale"] = torch.full((1,), 2.0, device=DEVICE)
    calls = [(add_layer_norm, make_grads(shape, dtypes[1], 2))] + (
        [] if scales else [(apply_layer_norm, make_grads(shape, dtypes[0], 1))]
    )
    expected = [compute_results(function, inputs, grads) for function, grads in calls]
    monkeypatch.setattr(operators, "FALLBACK_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(operators, "failures", failures := {})
    monkeypatch.setattr(kernels, "_layer_norm_fwd", None)
    monkeypatch.setattr(kernels, "_layer_norm_bwd", None)
    for (function, grads), kernel_results in zip(calls, expected, strict=True):
        assert_close(compute_results(function, inputs, grads), kernel_results)
    assert len(failures) == 2 * len(calls)


def test_results_are_deterministic():
    inputs = make_inputs(5, 23, 96, dtype=torch.bfloat16, scales=True)
    grads = make_grads((5, 23, 96), torch.bfloat16, 2)
    first, second = (compute_results(add_layer_norm, inputs, grads) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_rows_are_independent():
    inputs = make_inputs(23, 96, dtype=torch.bfloat16)
    whole = layer_norm(inputs["x"], inputs["weight"], inputs["bias"], EPS)
    assert torch.equal(layer_norm(inputs["x"][5:7], inputs["weight"], inputs["bias"], EPS), whole[5:7])


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
def test_gradients_with_one_unused_output_match_reference(used, scales):
    inputs = make_inputs(2, 9, 48, scales=scales)
    grads = [None, None]
    grads[used] = randn(2, 9, 48, seed=7)
    ours = compute_results(add_layer_norm, inputs, grads)
    theirs = compute_results(reference_add_layer_norm, inputs, grads)
    exact = compute_results(reference_add_layer_norm, inputs, grads, cast=torch.Tensor.double)
    for name in ours:
        if name in theirs:
            assert_no_worse_than(ours[name], theirs[name], exact[name], name=name)
        else:  # PyTorch returns None for inputs that do not contribute
            assert ours[name].count_nonzero() == 0, name


def test_only_requested_gradients_are_computed(monkeypatch):
    launch, parameter_grads = kernels._layer_norm_backward, []

    def spy(*args, **kwargs):
        grads = launch(*args, **kwargs)
        parameter_grads.append(grads[2])
        return grads

    monkeypatch.setattr(kernels, "_layer_norm_backward", spy)
    inputs = make_inputs(2, 9, 48)
    x = inputs["x"].requires_grad_()
    summed, y = add_layer_norm(**inputs, eps=EPS)
    (summed.sum() + y.sum()).backward()
    assert x.grad is not None
    assert inputs["weight"].grad is None
    assert inputs["residual"].grad is None
    assert [grads.numel() for grads in parameter_grads] == [0]


def test_branch_and_residual_share_one_gradient_tensor():
    inputs = make_inputs(2, 9, 48)
    grads = compute_results(add_layer_norm, inputs, make_grads((2, 9, 48), torch.float32, 2))
    assert grads["grad x"].data_ptr() == grads["grad residual"].data_ptr()


def test_rows_beyond_int32_offsets_are_addressed():
    storage = torch.UntypedStorage(2**32 + 2**12, device=DEVICE)  # untouched pages take no physical memory
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage).as_strided((2, 3, 8), (2**31, 8, 1))
    inputs = make_inputs(2, 3, 8, dtype=torch.float16)
    far.copy_(inputs["x"])
    assert torch.equal(
        layer_norm(far, inputs["weight"], inputs["bias"], EPS),
        layer_norm(inputs["x"], inputs["weight"], inputs["bias"], EPS),
    )


@pytest.mark.parametrize("scales", [False, True], ids=["", "scales"])
def test_opcheck(scales):
    inputs = make_inputs(2, 3, 16, scales=scales)
    values = [inputs.get(name) for name in ("x", "residual", "weight", "bias", "scale", "row_scale")]
    x, residual, weight, bias, scale, row_scale = values
    statistics, options = randn(2, 6), (x.dtype, x.dtype, True, x.dtype, None if scales else "gelu", 0)
    torch.library.opcheck(
        kernels._layer_norm_backward,
        (x, residual, residual, x if scales else None, weight, bias, scale, row_scale, statistics, *options),
    )
    for tensor in values[:5]:
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(kernels._layer_norm, (*values, EPS, None, None, 0))
    torch.library.opcheck(kernels._layer_norm, (x, None, weight, bias, None, None, EPS, None, None, 0))


def apply_two_norms(x, residual, weight, bias, scale, row_scale):
    summed, y = add_layer_norm(x, residual, weight, bias, EPS, scale=scale, row_scale=row_scale)
    return summed + layer_norm(y, weight, bias, EPS)


def compute_two_norms(function, inputs):
    inputs = {name: tensor.detach().requires_grad_(name != "row_scale") for name, tensor in inputs.items()}
    output = function(**inputs)
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


def test_compiles_without_graph_breaks():
    compiled = torch.compile(apply_two_norms, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second has a dynamic shape
        inputs = make_inputs(batch, 3, 16, scales=True)
        for ours, expected in zip(
            compute_two_norms(compiled, inputs), compute_two_norms(apply_two_norms, inputs), strict=True
        ):
            torch.testing.assert_close(ours, expected)


def test_activation_checkpointing_matches_plain_backward():
    inputs = make_inputs(2, 3, 16, scales=True)
    expected_results = compute_two_norms(apply_two_norms, inputs)
    again = compute_two_norms(lambda **named: checkpoint(apply_two_norms, *named.values(), use_reentrant=False), inputs)
    for ours, expected in zip(again, expected_results, strict=True):
        assert torch.equal(ours, expected)


def test_exports_with_dynamic_batch_size():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(randn(16, seed=3))
            self.bias = torch.nn.Parameter(randn(16, seed=4))

        def forward(self, x, residual):
            return add_layer_norm(layer_norm(x, self.weight, self.bias, EPS), residual, self.weight, self.bias, EPS)

    block, batch = Block(), {0: torch.export.Dim("batch", min=2, max=64)}
    example = (randn(2, 3, 16), randn(2, 3, 16, seed=1))
    program = torch.export.export(block, example, dynamic_shapes=(batch, batch))
    x, residual = randn(5, 3, 16, seed=8), randn(5, 3, 16, seed=9)
    for ours, expected in zip(program.module()(x, residual), block(x, residual), strict=True):
        assert torch.equal(ours, expected)


def test_autocast_changes_neither_dtype_nor_values():
    inputs = make_inputs(2, 3, 16, dtype=torch.bfloat16, residual_dtype=torch.float32, weight_dtype=torch.float32)
    expected = add_layer_norm(**inputs, eps=EPS)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = add_layer_norm(**inputs, eps=EPS)
        assert layer_norm(inputs["x"], inputs["weight"], inputs["bias"], EPS).dtype == torch.bfloat16
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected \[..., D\].*got \[\]"),
        ({"x": torch.zeros(2, 0)}, r"x: expected \[..., D\].*got \[2, 0\]"),
        ({"x": torch.zeros(2, 8193)}, r"x: .*8192, got \[2, 8193\]"),
        ({"x": torch.zeros(2, 3, 16).double()}, "x: expected torch.float32 .*got torch.float64"),
        ({"weight": torch.zeros(15)}, r"weight: expected \[16\], got \[15\]"),
        ({"weight": torch.zeros(1, 16)}, r"weight: expected \[16\], got \[1, 16\]"),
        ({"weight": torch.zeros(16, device="meta")}, "weight: expected device .*got meta"),
        ({"bias": torch.zeros(16).half()}, "bias: expected torch.float32, got torch.float16"),
        ({"residual": torch.zeros(1, 3, 16)}, r"residual: expected \[2, 3, 16\], got \[1, 3, 16\]"),
        ({"residual": torch.zeros(2, 3, 16).int()}, "residual: expected .*got torch.int32"),
        ({"scale": torch.zeros(3)}, r"scale: expected \[16\], got \[3\]"),
        ({"row_scale": torch.zeros(3)}, r"row_scale: expected \[2\], got \[3\]"),
        ({"row_scale": torch.zeros(2).half()}, "row_scale: expected torch.float32, got torch.float16"),
    ],
)
def test_invalid_input_raises_before_launch(changes, message, monkeypatch):
    monkeypatch.setattr(kernels, "_layer_norm_fwd", None)
    inputs = {name: tensor.cpu() for name, tensor in make_inputs(2, 3, 16).items()} | changes
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**inputs, eps=EPS)
