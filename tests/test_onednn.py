"""Products on the CPU by oneDNN, and attention made of them: PyTorch's numbers and gradients, only where it may be."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accuracy import errors

from fastvit import onednn, onednn_attention, reference

pytestmark = pytest.mark.skipif(not onednn.is_there(), reason="this PyTorch or processor has no such product")


@pytest.fixture
def any_size(monkeypatch):
    """Products that are too small to be worth it are taken as well."""
    monkeypatch.setattr(onednn, "FEWEST_WEIGHTS", 0)


@pytest.fixture
def rounds_any_size(monkeypatch):
    monkeypatch.setattr(onednn, "FEWEST_TO_ROUND", 0)


def operands(rows=(2, 7), depth=24, units=40, bias=True, grad=True):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((*rows, depth), (units, depth), (units,))]
    tensors = [tensor.requires_grad_(grad) for tensor in tensors]
    return tensors if bias else [*tensors[:2], None]


def outcome(function, tensors):
    """Output and gradients, for one random gradient of the output."""
    output = function(*tensors)
    given = [tensor for tensor in tensors if tensor is not None]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, given, grad)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(("depth", "units"), [(24, 40), (1, 1), (33, 7), (192, 768)])
def test_output_and_gradients_are_those_of_float32(any_size, rows, depth, units, bias):
    tensors = operands(rows, depth, units, bias)
    assert onednn.takes(tensors[0], tensors[1])
    ours, theirs = outcome(onednn.linear, tensors), outcome(F.linear, tensors)
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]
    for found, expected, exact in zip(ours, theirs, outcome(F.linear, wide), strict=True):
        assert found.shape == exact.shape
        assert errors(found, exact)[0] <= max(2 * errors(expected, exact)[0], 4e-7)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_within_the_product(form):
    x, weight, bias = operands(grad=False)
    expected = F.gelu(F.linear(x, weight, bias), approximate=form)
    torch.testing.assert_close(onednn.product(x, weight, bias, gelu=form), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu", "relu"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_feed_forward_is_the_same_with_and_without(any_size, activation, grad):
    x, weight1, bias1 = operands(grad=grad)
    weight2, bias2 = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) for shape in ((24, 40), (24,)))
    arguments = (x, weight1, bias1, weight2.requires_grad_(grad), bias2.requires_grad_(grad), activation)
    found = reference.feed_forward(*arguments)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = reference.feed_forward(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.requires_grad == grad


@pytest.mark.parametrize("autocast", [False, True])
def test_shapes_that_do_not_fit_are_pytorchs_error(any_size, rounds_any_size, autocast):
    x, weight, bias = operands()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(RuntimeError, match="cannot be mult"):
        onednn.linear(x[..., :12], weight, bias)


def test_views_are_taken_as_they_are(any_size):
    x, weight, bias = operands((6,), grad=False)
    wide = torch.zeros(12, 48)
    wide[::2, ::2] = x
    torch.testing.assert_close(
        onednn.linear(wide[::2, ::2], weight.t().contiguous().t(), bias), F.linear(x, weight, bias)
    )


def test_second_derivatives_are_right(any_size):
    tensors = [tensor.detach()[..., :4].clone().requires_grad_() for tensor in operands((3,), 4, 5)]
    tensors[2] = torch.randn(5, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def penalty(function):
        (grad,) = torch.autograd.grad(function(*tensors).square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors)

    for found, expected in zip(penalty(onednn.linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_small_float32_products_are_pytorchs():
    weight = torch.randn(256, 256)
    assert onednn.takes(torch.randn(256, 256), weight)
    assert not onednn.takes(torch.randn(255, 256), weight)
    assert onednn.takes(torch.randn(1, 256), torch.randn(1024, 256))


def test_what_it_does_not_take_is_pytorchs(any_size):
    x, weight, bias = operands(grad=False)
    assert not onednn.takes(x.bfloat16(), weight.bfloat16())  # a gradient may be recorded
    assert not onednn.takes(x.double(), weight.double())
    assert not onednn.takes(x[:0], weight)
    assert not onednn.takes(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.takes(x, weight)
        assert onednn.linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.takes(x, weight)
    assert onednn.linear(x[:0], weight, bias).shape == (0, 7, 40)
    compiled = torch.compile(lambda *tensors: onednn.linear(*tensors), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


needs_bfloat16 = pytest.mark.skipif(
    not onednn.has_bfloat16(), reason="the processor has no bfloat16 products, or has tiles for them"
)


@needs_bfloat16
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@torch.no_grad()
def test_bfloat16_products_are_no_worse_than_pytorchs(gelu):
    x, weight, bias = (tensor.bfloat16() for tensor in operands((2, 197), 192, 768, grad=False))
    assert onednn.takes(x, weight)

    def theirs(*tensors):
        return F.linear(*tensors) if gelu is None else F.gelu(F.linear(*tensors), approximate=gelu)

    exact = theirs(x.double(), weight.double(), bias.double())
    found, expected = onednn.product(x, weight, bias, gelu=gelu), theirs(x, weight, bias)
    assert errors(found, exact)[0] <= 1.05 * errors(expected, exact)[0]


def heads(batch, queries, keys, num_heads, head_dim, layout="apart"):
    generator = torch.Generator().manual_seed(0)
    if layout == "packed":
        qkv = torch.randn(batch, queries, 3, num_heads, head_dim, generator=generator).bfloat16()
        return qkv.unbind(2)
    return [
        torch.randn(batch, tokens, num_heads, head_dim, generator=generator).bfloat16()
        for tokens in (queries, keys, keys)
    ]


SHAPES = pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 197, 197, 3, 64), "packed"),
        ((2, 257, 257, 4, 80), "packed"),
        ((1, 197, 577, 7, 96), "apart"),
        ((1, 1025, 1025, 1, 32), "apart"),  # more scores a head than are computed at a time
        ((64, 65, 65, 3, 32), "apart"),
    ],
    ids=str,
)


@needs_bfloat16
@pytest.mark.parametrize("scale", [None, 0.3])
@SHAPES
@torch.no_grad()
def test_attention_is_no_worse_than_pytorchs(shape, layout, scale):
    query, key, value = heads(*shape, layout)
    assert onednn_attention.attends(query, key, value)
    found = reference.attention(query, key, value, scale=scale)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_attention.attends(query, key, value)
        expected = reference.attention(query, key, value, scale=scale)
    exact = reference.attention(query.double(), key.double(), value.double(), scale=scale)
    assert found.shape == exact.shape
    # The larger the scores the more one probability stands out; PyTorch's rounds it before it divides by the sum: to 1.
    assert errors(found, exact)[0] <= (1.25 if scale is None else 1.3) * errors(expected, exact)[0]


@needs_bfloat16
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@SHAPES
def test_gradients_of_attention_are_no_worse_than_pytorchs(shape, layout, autocast):
    tensors = heads(*shape, layout)

    def results(dtype=torch.bfloat16):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            output = reference.attention(*inputs)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad)], output.grad_fn

    found, made_by = results()
    assert "Attention" in str(made_by)
    with torch.backends.mkldnn.flags(enabled=False):
        expected, made_by = results()
    assert "Attention" not in str(made_by)
    for ours, theirs, exact in zip(found, expected, results(torch.float64)[0], strict=True):
        assert ours.shape == exact.shape
        assert errors(ours, exact)[0] <= 1.25 * errors(theirs, exact)[0]


@needs_bfloat16
def test_attention_keeps_no_more_for_backward_than_pytorchs_where_there_are_many_keys():
    def kept(tokens):
        sizes = []
        query, key, value = (x.requires_grad_() for x in heads(1, tokens, tokens, 8, 64))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            assert "Attention" in str(reference.attention(query, key, value).grad_fn)
        return sum(sizes) / query.numel()

    assert kept(577) == 3  # query, key, value; PyTorch's keeps the output too
    assert 4 <= kept(197) <= 7  # probabilities, at most as large as four of these


@needs_bfloat16
@torch.no_grad()
@pytest.mark.parametrize("scale", [None, 0.3])
def test_packed_and_apart_are_the_same_bits(scale):
    qkv = torch.randn(2, 197, 3 * 4 * 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    apart = [part.unflatten(-1, (4, 64)) for part in qkv.chunk(3, dim=-1)]
    assert onednn_attention.attends(*apart)
    packed = reference.attention_packed(qkv, num_heads=4, scale=scale)
    assert torch.equal(packed, reference.attention(*apart, scale=scale))


@needs_bfloat16
@torch.no_grad()
def test_large_scores_keep_their_precision():
    query, key, value = heads(8, 197, 197, 3, 64)
    query = query * 8  # scores of 30 and more, where a rounded score is off by a tenth
    exact = reference.attention(query.double(), key.double(), value.double())
    with torch.backends.mkldnn.flags(enabled=False):
        expected = reference.attention(query, key, value)
    assert errors(onednn_attention.attention(query, key, value), exact)[0] <= 1.3 * errors(expected, exact)[0]


@needs_bfloat16
def test_attention_that_it_does_not_compute_is_pytorchs():
    query, key, value = heads(8, 197, 197, 3, 64)
    assert onednn_attention.attends(query, key, value)
    few = [x[:1, :, :2] for x in (query, key, value)]
    assert onednn_attention.attends(*few)
    with torch.no_grad():  # the same is too little work without a backward pass
        assert onednn_attention.attends(query[:1], key[:1], value[:1])
        assert not onednn_attention.attends(*few)
    assert not onednn_attention.attends(query[:1, :10], key[:1], value[:1])
    assert not onednn_attention.attends(*(x.float() for x in (query, key, value)))
    mask = torch.ones(197, 197, dtype=torch.bool).tril()
    found = reference.attention(query, key, value, mask=mask)
    exact = reference.attention(query.double(), key.double(), value.double(), mask=mask)
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.02)


@needs_bfloat16
def test_threads_do_not_share_their_scratch():
    cases = [[x.roll(i) for x in heads(2, 197, 197, 8, 64)] for i in range(4)]

    @torch.no_grad()
    def run(case):
        return [onednn_attention.attention(*case) for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, cases))
    for case, outputs in zip(cases, found, strict=True):
        (expected, *_) = run(case)
        assert all(torch.equal(output, expected) for output in outputs)


def autocast(function):
    def call(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*tensors)

    return call


def gelu_linear(x, weight, bias):
    return onednn.rounded_linear(x, "none", weight, bias)


def gelu_linear_of_pytorch(x, weight, bias):
    return F.linear(F.gelu(x.to(torch.bfloat16) if x.dtype == torch.float32 else x), weight, bias)


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [(1,), (2, 7), (2, 3, 4), (2, 197)], ids=str)
@pytest.mark.parametrize(("depth", "units"), [(24, 40), (1, 1), (33, 7), (192, 768)])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(onednn.linear, F.linear), (gelu_linear, gelu_linear_of_pytorch)], ids=["linear", "gelu"]
)
def test_autocast_is_no_worse_than_pytorchs(rounds_any_size, rows, depth, units, bias, ours, theirs):
    tensors = operands(rows, depth, units, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.rounds(tensors[0], tensors[1])
    assert not onednn.rounds(tensors[0], tensors[1])
    found, expected = outcome(autocast(ours), tensors), outcome(autocast(theirs), tensors)
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]
    for mine, other, exact in zip(found, expected, outcome(theirs, wide), strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert errors(mine, exact)[0] <= 1.25 * errors(other, exact)[0]
    with torch.no_grad():
        assert torch.equal(autocast(ours)(*tensors), found[0])


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layers_side_by_side_are_the_same_as_one_by_one(rounds_any_size, bias):
    x, *first = operands(bias=bias)
    second = [None if tensor is None else (tensor.detach()[:24] + 1).requires_grad_() for tensor in first]
    given = [x, *(tensor for tensor in (*first, *second) if tensor is not None)]

    def results(function):
        outputs = autocast(function)(x, [first, second])
        return [*outputs, *torch.autograd.grad([output.square().sum() for output in outputs], given)]

    together = results(onednn.linears)
    apart = results(lambda x, layers: [onednn.linear(x, *layer) for layer in layers])
    assert together[0].grad_fn.next_functions[0][0] is together[1].grad_fn.next_functions[0][0]
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05 * expected.abs().max().item())
    mixed = [first, [second[0], None if bias else torch.zeros(24)]]
    for found, expected in zip(autocast(onednn.linears)(x, mixed), together[:2], strict=True):
        assert found.shape == expected.shape


@needs_bfloat16
def test_only_wanted_gradients_are_computed(rounds_any_size):
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        tensors = [tensor.detach().requires_grad_(flag) for tensor, flag in zip(operands(), wanted, strict=True)]
        autocast(onednn.linear)(*tensors).sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == wanted


@needs_bfloat16
def test_a_step_does_not_disturb_another_of_the_same_weight(rounds_any_size):
    """Rounded weights are written to the same memory again; a gradient still is that of the weights that it is of."""
    x, weight, bias = operands()
    step = autocast(onednn.linear)
    (alone,) = torch.autograd.grad(step(x, weight, bias).sum(), x)

    first, second = step(x, weight, bias), step(2 * x, weight, bias)
    (given,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
    assert torch.equal(given, alone)
    with torch.no_grad():
        weight.add_(1)
    changed = step(x, weight, bias)
    (given,) = torch.autograd.grad(second.sum(), x)
    assert torch.equal(given, 2 * alone)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.sum(), x)
    (given,) = torch.autograd.grad(changed.sum(), x, retain_graph=True)
    assert not torch.equal(given, alone)
    step(x, weight + 1, bias)
    (again,) = torch.autograd.grad(changed.sum(), x)  # a second backward pass, weights unchanged
    assert torch.equal(again, given)


@needs_bfloat16
def test_memory_of_rounded_weights_is_kept_between_steps_and_goes_with_the_weight(rounds_any_size):
    x, weight, bias = operands()
    places = set()
    for _ in range(3):
        output = autocast(onednn.linear)(x, weight, bias)
        places.add(output.grad_fn.saved_tensors[1].data_ptr())
        output.sum().backward()
    assert len(places) == 1
    assert len(onednn.rounded.free) >= 1
    before = len(onednn.rounded.free)
    del output, weight
    gc.collect()
    assert len(onednn.rounded.free) == before - 1


@needs_bfloat16
def test_second_derivatives_under_autocast(rounds_any_size):
    tensors = operands((3,), 24, 40)

    def penalty(function):
        (grad,) = torch.autograd.grad(autocast(function)(*tensors).square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors)

    for ours, theirs in ((onednn.linear, F.linear), (gelu_linear, gelu_linear_of_pytorch)):
        for found, expected in zip(penalty(ours), penalty(theirs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0.03, atol=0.02 * expected.abs().max().item())


@needs_bfloat16
def test_what_is_not_rounded_is_pytorchs(rounds_any_size):
    x, weight, bias = operands()
    with torch.autocast("cpu", torch.float16):
        assert not onednn.rounds(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.rounds(x, weight.bfloat16())
        assert not onednn.rounds(x[:0], weight)
        assert not onednn.rounds(x.double(), weight)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not onednn.rounds(x, weight)
        with torch.autocast("cpu", enabled=False):
            assert not onednn.rounds(x, weight)
            assert onednn.linear(x, weight, bias).dtype == torch.float32
        compiled = torch.compile(lambda *tensors: onednn.linear(*tensors), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


@needs_bfloat16
@torch.no_grad()
def test_threads_round_weights_apart(rounds_any_size):
    cases = [[tensor + i for tensor in operands((2, 50), 96, 384, grad=False)] for i in range(4)]
    run = autocast(lambda *case: [onednn.linear(*case) for _ in range(20)])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: run(*case), cases))
    for case, outputs in zip(cases, found, strict=True):
        (expected, *_) = run(*case)
        assert all(torch.equal(output, expected) for output in outputs)
