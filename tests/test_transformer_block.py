"""The whole block as one operation: as exact as PyTorch's chain, and the same bits as the operations it is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastvit import ops, reference
from fastvit.reference import BlockWeights

pytest.importorskip("triton")
from operations import DEVICE, EPS, VIEWS, assert_close, assert_same, check, random, results, saved_bytes, view_of

from fastvit.kernels import transformer_block as kernels
from fastvit.kernels.transformer_block import transformer_block

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
RESIDUAL = pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
PARTS = BlockWeights._fields
TENSORS = [f"{part}_{kind}" for part in PARTS for kind in ("weight", "bias")]


def inputs_of(batch, tokens, dim, *, units=96, dtype=torch.float32, wide=None, residual=True, qkv_bias=True):
    """Named inputs; weights such that each product's output is about as large as its input. wide: the dtype of norms
    and residual, as under autocast."""
    wide = wide or dtype
    inputs = {"x": random(batch, tokens, dim, dtype=dtype, seed=1)}
    if residual:
        inputs["residual"] = random(batch, tokens, dim, dtype=wide, seed=2)
    for seed, part in enumerate(PARTS, 3):
        if part.startswith("norm"):
            inputs[f"{part}_weight"] = random(dim, dtype=wide, seed=seed, scale=0.5, shift=1.0)
            inputs[f"{part}_bias"] = random(dim, dtype=wide, seed=30 + seed)
            continue
        rows, columns = {"first": (units, dim), "second": (dim, units)}.get(part, (dim, dim))
        inputs[f"{part}_weight"] = random(rows, columns, dtype=dtype, seed=seed, scale=columns**-0.5)
        has_bias = qkv_bias or part not in ("query", "key", "value")
        inputs[f"{part}_bias"] = random(rows, dtype=dtype, seed=30 + seed) if has_bias else None
    return inputs


def weights_of(tensors):
    return BlockWeights.of([tensors[name] for name in TENSORS], EPS, 2 * EPS)


def lying_side_by_side(inputs):
    """The weights of query, key and value, and their biases, in one piece of memory each."""
    for kind in ("weight", "bias"):
        names = [f"{part}_{kind}" for part in ("query", "key", "value")]
        parameters = map(torch.nn.Parameter, torch.cat([inputs[name] for name in names]).chunk(3))
        inputs = inputs | dict(zip(names, parameters, strict=True))
    return inputs


def of(function, heads=2, activation="gelu"):
    """`function` as one of named tensors."""

    def call(x, residual=None, **tensors):
        return function(x, residual, weights_of(tensors), heads, activation)

    return call


def pytorch(x, residual, weights, heads, activation):
    """Op by op."""

    def norm(rows, weight, bias, eps):
        return F.layer_norm(rows, weight.shape, weight.to(rows.dtype), bias.to(rows.dtype), eps)

    residual = x if residual is None else x + residual
    normed = norm(residual, *weights.norm_before).to(x.dtype)
    query, key, value = (
        F.linear(normed, *affine).unflatten(-1, (heads, -1)).transpose(1, 2) for affine in weights[1:4]
    )
    context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    h = residual + F.linear(context, *weights.output)
    hidden = reference.ACTIVATIONS[activation](F.linear(norm(h, *weights.norm_after).to(x.dtype), *weights.first))
    return F.linear(hidden, *weights.second), h


def without_key_bias(inputs):
    """The names of those whose gradient is something: softmax does not see what is added to all its scores."""
    return tuple(name for name, tensor in inputs.items() if tensor is not None and name != "key_bias")


def check_block(inputs, heads=2, activation="gelu", **options):
    ways = (of(function, heads, activation) for function in (transformer_block, pytorch))
    check(*ways, inputs, wanted=without_key_bias(inputs), **options)


@RESIDUAL
def test_the_definition_of_the_reference_is_what_is_tested_against(residual):
    inputs = inputs_of(2, 5, 32, residual=residual)
    assert_close(results(of(reference.transformer_block), inputs), results(of(pytorch), inputs))


def test_the_tensors_of_a_block_and_back():
    inputs = inputs_of(1, 1, 32)
    weights = weights_of(inputs)
    assert weights.norm_before == (inputs["norm_before_weight"], inputs["norm_before_bias"], EPS)
    assert weights.norm_after[2] == 2 * EPS
    assert [tensor is inputs[name] for tensor, name in zip(weights.tensors(), TENSORS, strict=True)] == [True] * 16


@DTYPES
@RESIDUAL
def test_outputs_and_gradients_are_as_exact_as_pytorchs(dtype, residual):
    check_block(inputs_of(2, 17, 64, dtype=dtype, residual=residual))


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "units"),
    [(1, 50, 2, 32, 100), (3, 1, 1, 64, 64), (1, 197, 1, 80, 33), (2, 65, 1, 96, 16), (1, 33, 2, 128, 256)],
)
def test_any_sizes(batch, tokens, heads, head_dim, units):
    check_block(inputs_of(batch, tokens, heads * head_dim, units=units, dtype=torch.bfloat16), heads)


@pytest.mark.parametrize("activation", ["gelu_new", "quick_gelu"])
def test_other_activations_and_no_bias_of_query_key_and_value(activation):
    inputs = inputs_of(2, 9, 32, dtype=torch.bfloat16, qkv_bias=False)
    check_block(inputs, activation=activation)


def test_a_wide_residual_with_narrow_layers():
    inputs = inputs_of(2, 17, 64, dtype=torch.bfloat16, wide=torch.float32)
    check_block(inputs)
    branch, h = of(transformer_block)(**inputs)
    assert (branch.dtype, h.dtype) == (torch.bfloat16, torch.float32)


def test_a_wide_feed_forward_after_narrow_attention():
    wide = inputs_of(2, 9, 64)
    attention = ("x", "query", "key", "value", "output")
    inputs = {
        name: tensor.bfloat16() if name.partition("_")[0] in attention else tensor for name, tensor in wide.items()
    }
    assert_same(results(of(transformer_block), inputs), results(of(kernels._pieces), inputs))


@DTYPES
def test_the_same_bits_as_the_operations_it_is_made_of(dtype):
    inputs = inputs_of(2, 17, 64, dtype=dtype)
    assert_same(results(of(transformer_block), inputs), results(of(kernels._pieces), inputs))


def test_the_same_bits_under_autocast():
    inputs = inputs_of(2, 17, 64)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = (results(of(function), inputs) for function in (transformer_block, kernels._pieces))
    assert_same(found, expected)
    assert found["output 0"].dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in found.items() if name.startswith("grad")} == {torch.float32}


def test_inference_gives_the_same_bits():
    inputs = inputs_of(2, 17, 64, dtype=torch.bfloat16)
    trained = of(transformer_block)(**{name: tensor.requires_grad_() for name, tensor in inputs.items()})
    with torch.no_grad():
        used = of(transformer_block)(**inputs)
    assert all(torch.equal(first, second) for first, second in zip(trained, used, strict=True))


ALONE = (
    *(("x",), ("norm_before_bias",), ("query_weight",), ("value_bias", "key_weight"), ("output_weight",)),
    *(("output_bias",), ("norm_after_weight",), ("first_weight",), ("second_bias",), ("first_weight", "query_bias")),
)


@pytest.mark.parametrize(
    ("wanted", "residual"),
    [*((wanted, residual) for wanted in ALONE for residual in (True, False)), (("residual",), True)],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else "residual" if value else "alone",
)
def test_any_of_the_gradients_alone(wanted, residual):
    inputs = inputs_of(2, 9, 32, residual=residual)
    every = results(of(transformer_block), inputs)
    some = results(of(transformer_block), inputs, wanted=wanted)
    assert_same(some, {name: every[name] for name in some})
    assert {name.removeprefix("grad ") for name in some if name.startswith("grad")} == set(wanted)


def test_attention_is_not_gone_back_through_for_what_comes_after_it(monkeypatch):
    monkeypatch.setattr(kernels.attention._attention_packed_backward, "function", None)
    monkeypatch.setattr(kernels.layer_norm_gelu._layer_norm_linear_backward, "function", None)
    results(of(transformer_block), inputs_of(2, 9, 32), wanted=("output_bias", "first_weight"))


@pytest.mark.parametrize("unused", [0, 1])
def test_one_output_alone(unused):
    inputs = inputs_of(2, 9, 32)
    found, expected = (results(of(function), inputs, unused=(unused,)) for function in (transformer_block, pytorch))
    for name in expected:
        if name != "grad key_bias":
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", VIEWS)
def test_views_that_are_not_contiguous(kind):
    inputs = inputs_of(2, 9, 32)
    expected = results(of(transformer_block), inputs)
    strided = {**inputs, "x": view_of(kind, inputs["x"]), "residual": view_of(kind, inputs["residual"])}
    strided |= {name: inputs[name].t().contiguous().t() for name in ("query_weight", "output_weight", "first_weight")}
    assert_close(results(of(transformer_block), strided), expected)


def test_an_empty_batch():
    found = results(of(transformer_block), inputs_of(0, 5, 32))
    assert found["output 0"].shape == found["grad x"].shape == (0, 5, 32)
    assert all(found[f"grad {name}"].count_nonzero() == 0 for name in TENSORS)


def test_weights_side_by_side_are_not_copied():
    grads, joined = [], []
    for inputs in (inputs_of(1, 3, 32), lying_side_by_side(inputs_of(1, 3, 32))):
        given, kept = {name: tensor.requires_grad_() for name, tensor in inputs.items()}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, id):
            of(transformer_block)(**given)
        joined.append((96, 32) in [tensor.shape for tensor in kept if same_memory(tensor, given["query_weight"])])
        branch, h = of(transformer_block)(**given)
        (branch.sum() + h.square().sum()).backward()
        grads.append({name: tensor.grad for name, tensor in given.items()})
    assert joined == [False, True]
    assert_same(*grads)


def same_memory(tensor, other):
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_no_more_is_kept_than_by_the_operations_it_is_made_of():
    inputs = inputs_of(2, 17, 64, dtype=torch.bfloat16)
    assert saved_bytes(of(transformer_block), inputs) <= saved_bytes(of(kernels._pieces), inputs)


def test_a_change_of_a_kept_weight_is_noticed():
    for name in ("query_weight", "key_weight", "value_weight", "second_weight"):
        inputs = {key: tensor.requires_grad_() for key, tensor in lying_side_by_side(inputs_of(1, 3, 32)).items()}
        branch, _ = of(transformer_block)(**inputs)
        with torch.no_grad():
            inputs[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            branch.sum().backward()


def test_checkpointing_gives_the_same_bits():
    inputs = inputs_of(2, 9, 32, dtype=torch.bfloat16)

    def checkpointed(**given):
        return checkpoint(of(transformer_block), **given, use_reentrant=False)

    assert_same(results(checkpointed, inputs), results(of(transformer_block), inputs))


def test_compilers_see_operators():
    inputs = inputs_of(2, 9, 32)
    compiled = torch.compile(of(transformer_block), fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, inputs), results(of(transformer_block), inputs))


def test_second_derivatives_are_an_error():
    inputs = inputs_of(1, 3, 32)
    x = inputs.pop("x").requires_grad_()
    branch, _ = of(transformer_block)(x, **inputs)
    (grad,) = torch.autograd.grad(branch.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": random(3, 32)}, r"x: expected \[B, N, D\] with at least one token, got \[3, 32\]"),
        ({"x": random(2, 0, 32)}, r"x: expected \[B, N, D\] with at least one token"),
        ({"residual": random(2, 9, 31)}, r"residual: expected \[2, 9, 32\], got \[2, 9, 31\]"),
        ({"norm_before_bias": random(31)}, r"weights.norm_before: expected \[32\], got \[31\]"),
        ({"key_weight": random(32, 16)}, r"weights.key: expected \[32, 32\], got \[32, 16\]"),
        ({"value_bias": random(16)}, r"weights.value: expected \[32\], got \[16\]"),
        ({"second_weight": random(32, 95)}, r"weights.second: expected \[32, 96\], got \[32, 95\]"),
        ({"output_weight": random(32, 32, dtype=torch.float16)}, r"weights.output: expected torch.float32, got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        of(transformer_block)(**(inputs_of(2, 9, 32) | change))


def test_heads_and_activations_that_the_kernels_lack():
    inputs = inputs_of(2, 9, 32)
    with pytest.raises(ValueError, match="num_heads: expected D / num_heads to be a multiple of 8 from 16 to 128"):
        of(transformer_block, heads=4)(**inputs)
    with pytest.raises(ValueError, match="activation: expected one of gelu"):
        of(transformer_block, activation="relu")(**inputs)
    assert of(ops.transformer_block, heads=4, activation="relu")(**inputs)[0].shape == (2, 9, 32)  # plain PyTorch
