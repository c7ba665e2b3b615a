"""A whole block by oneDNN on a CPU: the bits of its pieces, no worse than PyTorch's, only where it may be."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from accuracy import errors

import fastvit
from fastvit import onednn, onednn_attention, onednn_block, ops, reference
from fastvit.reference import BlockWeights

pytestmark = pytest.mark.skipif(
    not (onednn.is_there() and onednn.has_bfloat16()),
    reason="this processor has no bfloat16 products, or tiles for them",
)
NORMS = (0, 1, 10, 11)


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(onednn, "FEWEST_TO_ROUND", 0)
    monkeypatch.setattr(onednn_attention, "FEWEST_IN_TRAINING", 0)
    monkeypatch.setattr(onednn_attention, "FEWEST_FOR_SCORES", 0)


def block_of(dim, units, *, qkv_bias=True, seed=0):
    """The sixteen tensors of a block."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for rows, columns in ((dim, 0), *[(dim, dim)] * 4, (dim, 0), (units, dim), (dim, units)):
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5 if columns else None
        if weight is None:
            weight = torch.rand(rows, generator=generator) + 0.5
        tensors += [weight, torch.randn(rows, generator=generator) / 8]
    if not qkv_bias:
        tensors[3:9:2] = None, None, None
    return [None if tensor is None else tensor.requires_grad_() for tensor in tensors]


def tokens_of(batch, tokens, dim, residual=True):
    """x and residual, as under autocast after the first block, or x alone as in the first."""
    generator = torch.Generator().manual_seed(1)
    x, other = (torch.randn(batch, tokens, dim, generator=generator) for _ in range(2))
    return [x.bfloat16().requires_grad_(), other.requires_grad_()] if residual else [x.requires_grad_(), None]


def weights_of(tensors):
    return BlockWeights.of(tensors, 1e-6, 1e-5)


def of_pytorch(x, residual, weights, heads, activation="gelu"):
    """Op by op."""
    residual = x if residual is None else x + residual
    normed = F.layer_norm(residual, residual.shape[-1:], *weights.norm_before)
    query, key, value = (F.linear(normed, *pair).unflatten(-1, (heads, -1)).transpose(1, 2) for pair in weights[1:4])
    context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    h = F.linear(context, *weights.output) + residual
    hidden = F.linear(F.layer_norm(h, h.shape[-1:], *weights.norm_after), *weights.first)
    return F.linear(reference.ACTIVATIONS[activation](hidden), *weights.second), h


def results(function, inputs, tensors, heads, activation="gelu", autocast=True):
    """Branch, h and all gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        branch, h = function(*inputs, weights_of(tensors), heads, activation)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (branch, h)]
    given = [tensor for tensor in (*inputs, *tensors) if tensor is not None and tensor.requires_grad]
    return [branch.detach(), h.detach(), *torch.autograd.grad([branch, h], given, grads)]


SHAPES = pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "units"),
    [(1, 197, 3, 64, 768), (2, 33, 2, 32, 100), (3, 1, 1, 80, 64), (1, 400, 1, 96, 33), (2, 7, 2, 128, 64)],
)


@SHAPES
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_bits_are_those_of_its_pieces(batch, tokens, heads, head_dim, units, residual):
    dim = heads * head_dim
    inputs, tensors = tokens_of(batch, tokens, dim, residual), block_of(dim, units)
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn_block.takes(*inputs, weights_of(tensors), heads, "gelu")
    found = results(onednn_block.transformer_block, inputs, tensors, heads)
    expected = results(reference.transformer_block, inputs, tensors, heads)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"seed": 3}], ids=["no bias of query, key, value", "tanh"])
def test_bits_without_biases_and_with_another_gelu(options):
    inputs, tensors = tokens_of(2, 17, 64), block_of(64, 96, **options)
    activation = "gelu_new" if "seed" in options else "gelu"
    found = results(onednn_block.transformer_block, inputs, tensors, 2, activation)
    expected = results(reference.transformer_block, inputs, tensors, 2, activation)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@SHAPES
def test_no_worse_than_pytorchs(batch, tokens, heads, head_dim, units):
    dim = heads * head_dim
    inputs, tensors = tokens_of(batch, tokens, dim), block_of(dim, units)
    found = results(onednn_block.transformer_block, inputs, tensors, heads)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = results(of_pytorch, inputs, tensors, heads)
    wide = [[tensor.detach().double().requires_grad_() for tensor in group] for group in (inputs, tensors)]
    exact = results(of_pytorch, *wide, heads, autocast=False)
    names = ["branch", "h", "x", "residual", *range(16)]
    for name, mine, other, true in zip(names, found, expected, exact, strict=True):
        if name == 5 or (tokens == 1 and name in (2, 3, 4, 5)):  # the key's bias, and scores of one key, change nothing
            continue
        assert errors(mine, true)[0] <= 1.25 * errors(other, true)[0], name


@SHAPES
@torch.no_grad()
def test_inference_is_no_worse_than_pytorchs(batch, tokens, heads, head_dim, units):
    dim = heads * head_dim
    inputs = [tensor.bfloat16() for tensor in tokens_of(batch, tokens, dim)]
    tensors = [tensor.bfloat16() for tensor in block_of(dim, units)]
    assert onednn_block.takes(*inputs, weights_of(tensors), heads, "gelu")
    found = onednn_block.transformer_block(*inputs, weights_of(tensors), heads, "gelu")
    with torch.backends.mkldnn.flags(enabled=False):
        expected = of_pytorch(*inputs, weights_of(tensors), heads)
    exact = of_pytorch(*(x.double() for x in inputs), weights_of([x.double() for x in tensors]), heads)
    for mine, other, true in zip(found, expected, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert errors(mine, true)[0] <= 1.25 * errors(other, true)[0]


def test_without_gradients_autocast_gives_the_same():
    inputs, tensors = tokens_of(2, 50, 96), block_of(96, 384)
    branch, h, *_ = results(onednn_block.transformer_block, inputs, tensors, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = onednn_block.transformer_block(*inputs, weights_of(tensors), 3, "gelu")
    assert torch.equal(found[1], h)
    torch.testing.assert_close(found[0], branch, rtol=0.02, atol=0.02)  # GELU within the product


@pytest.mark.parametrize("wanted", [(), (0,), (2, 3), (6,), (8, 9), (10, 11), (12,), (15,), NORMS])
def test_only_wanted_gradients(wanted):
    inputs, tensors = tokens_of(1, 9, 32), block_of(32, 64)
    everything = results(onednn_block.transformer_block, inputs, tensors, 1)
    some = [tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(tensors)]
    found = results(onednn_block.transformer_block, inputs, some, 1)
    expected = [everything[index] for index in (0, 1, 2, 3, *(4 + index for index in sorted(wanted)))]
    assert len(found) == len(expected)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_steps_of_the_same_weights_do_not_disturb_each_other():
    inputs, tensors = tokens_of(1, 9, 32), block_of(32, 64)

    def step(scale=1.0):
        with torch.autocast("cpu", torch.bfloat16):
            branch, h = onednn_block.transformer_block(
                (inputs[0] * scale).bfloat16(), inputs[1], weights_of(tensors), 1, "gelu"
            )
        return branch.float().sum() + h.sum()

    (alone,) = torch.autograd.grad(step(), inputs[1])
    first, second = step(), step(2.0)
    (given,) = torch.autograd.grad(first, inputs[1], retain_graph=True)
    assert torch.equal(given, alone)
    (other,) = torch.autograd.grad(second, inputs[1])
    step(3.0)
    (given,) = torch.autograd.grad(first, inputs[1], retain_graph=True)  # its rounded weights are written anew
    assert torch.equal(given, alone)
    with torch.no_grad():
        tensors[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first, inputs[1])
    assert not torch.equal(other, alone)


def test_what_it_keeps_is_what_its_pieces_keep():
    def kept(function):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs, tensors = tokens_of(1, 197, 192), block_of(192, 768)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            outputs = function(*inputs, weights_of(tensors), 3, "gelu")
        del outputs
        return sum(sizes.values())

    assert kept(onednn_block.transformer_block) <= 1.01 * kept(reference.transformer_block)


def test_what_it_does_not_take_goes_by_pieces():
    inputs, tensors = tokens_of(1, 9, 32), block_of(32, 64)
    weights = weights_of(tensors)

    def takes(x=inputs[0], residual=inputs[1], weights=weights, activation="gelu"):
        return onednn_block.takes(x, residual, weights, 1, activation)

    halves = weights_of([tensor.detach().bfloat16() for tensor in tensors])
    x = inputs[0].detach()
    assert not takes()
    assert takes(x, x, halves)  # nothing that requires a gradient
    assert not takes(inputs[0], x, halves)
    assert not takes(x.float(), x, halves)
    with torch.autocast("cpu", torch.bfloat16):
        assert takes()
        assert not takes(activation="quick_gelu")
        assert not takes(inputs[0], inputs[0])  # a narrow residual
        assert not takes(weights=weights_of([*tensors[:10], *(x.detach().bfloat16() for x in tensors[10:])]))
        assert not takes(weights=weights_of([*tensors[:3], None, *tensors[4:]]))  # query without bias, key with one
        with torch.backends.mkldnn.flags(enabled=False):
            assert not takes()
        onednn_attention.FEWEST_IN_TRAINING = 10**6
        assert not takes()
    with torch.autocast("cpu", torch.float16):
        assert not takes()


def model_of(**options):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, image_size=32, patch_size=8
    )
    config.update(options)
    return fastvit.ViTForImageClassification(config).train()


def step(model):
    """How many of the blocks were taken whole, logits and gradients."""
    model.zero_grad()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(pixels).logits
    logits.float().square().sum().backward()
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(following for following, _ in node.next_functions)
    taken = sum("TransformerBlock" in str(node) for node in seen)
    return taken, logits.detach(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_give_the_same_gradients(use_reentrant):
    model = model_of()
    _, logits, grads = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    taken, again, grads_again = step(model)
    assert taken == (0 if use_reentrant else 2)  # blocks are nodes of checkpoint's own
    torch.testing.assert_close(again, logits, rtol=0.02, atol=0.01)  # reentrant: first computed without gradients
    for name, grad in grads.items():
        # A checkpointed block gets the sum of the block before it, others its two parts: one is rounded once more.
        if not name.endswith("key.bias"):  # 0, but for rounding
            torch.testing.assert_close(grads_again[name], grad, rtol=0.05, atol=0.02 * grad.abs().max().item() + 1e-6)


def test_a_model_takes_it_where_nobody_watches_its_blocks():
    model = model_of()
    taken, logits, grads = step(model)
    assert taken == 2  # of the last block the class token alone is wanted
    with torch.backends.mkldnn.flags(enabled=False):
        taken, expected, expected_grads = step(copy.deepcopy(model))
    assert taken == 0
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0.05, atol=0.02)
    for name, grad in grads.items():
        largest = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grad, expected_grads[name], rtol=0.1, atol=0.05 * largest + 1e-4)

    watched = copy.deepcopy(model)
    watched.vit.encoder.layer[0].attention.register_forward_hook(lambda *_: None)
    assert step(watched)[0] == 1
    with fastvit.backend("reference"):
        assert step(model)[0] == 2
    dropping = model_of(hidden_dropout_prob=0.1)
    assert step(dropping)[0] == 0
    assert step(dropping.eval())[0] == 2
    assert ops.whole_block(torch.randn(1, 3, 32), None, weights_of(block_of(32, 64)), 1, "gelu") is None


def test_threads_train_the_same_model_apart():
    model = model_of()
    weights = list(model.parameters())
    pictures = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def gradients(pixels):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixels).logits
        return torch.autograd.grad(logits.float().square().sum(), weights)

    expected = [gradients(pixels) for pixels in pictures]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, alone in zip(pool.map(gradients, pictures), expected, strict=True):
                assert all(torch.equal(grad, other) for grad, other in zip(found, alone, strict=True))
