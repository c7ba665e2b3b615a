"""Query, key and value lie in one piece of memory, remain parameters of their own, and nobody notices but the clock."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig

import fastvit
from fastvit.side_by_side import as_one, lay_side_by_side, lie_side_by_side


def small_model():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, num_labels=3
    )
    return fastvit.ViTForImageClassification(config).eval()


def pixels(dtype=torch.float32):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights_of(model, name="weight"):
    for layer in model.vit.encoder.layer:
        attention = layer.attention.attention
        yield [getattr(projection, name) for projection in (attention.query, attention.key, attention.value)]


def lies(model):
    return all(lie_side_by_side(tensors) for name in ("weight", "bias") for tensors in weights_of(model, name))


def apart(model):
    """The same model with every parameter in a memory of its own."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert not lies(model)
    return model


def parameters(count, *shape):
    return [nn.Parameter(torch.randn(*shape)) for _ in range(count)]


def test_every_way_to_a_model_lays_them_side_by_side(tmp_path):
    model = small_model()
    assert lies(model)
    model.save_pretrained(tmp_path)
    assert lies(fastvit.ViTForImageClassification.from_pretrained(tmp_path))
    assert lies(fastvit.ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert lies(copy.deepcopy(model))
    assert lies(pickle.loads(pickle.dumps(model)))
    assert lies(model.to(torch.bfloat16))


def test_the_model_computes_the_same_where_they_lie_apart():
    model = small_model()
    other = apart(model)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()).logits, other(pixels()).logits)
    for each in (model, other):
        each(pixels()).logits.square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_inference_sees_what_training_changes():
    model = small_model()
    model(pixels()).logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert lies(model)
    with torch.no_grad():
        after = model(pixels()).logits
        torch.testing.assert_close(after, apart(model)(pixels()).logits)
        for query, _, value in weights_of(model):
            query.data.mul_(2.0)  # not seen by version counters
            value.data.copy_(torch.ones_like(value))
        assert not torch.allclose(model(pixels()).logits, after)
        torch.testing.assert_close(model(pixels()).logits, apart(model)(pixels()).logits)


def test_saving_writes_each_parameter_once(tmp_path):
    model = small_model()
    state = model.state_dict()
    save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    model.save_pretrained(tmp_path / "folder")
    for stored in (
        load_file(tmp_path / "state.safetensors"),
        torch.load(tmp_path / "state.pt", weights_only=True),
        load_file(tmp_path / "folder" / "model.safetensors"),
    ):
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[name], state[name]) for name in state)
    size = sum(tensor.nbytes for tensor in state.values())
    for path in ("state.safetensors", "state.pt", "folder/model.safetensors"):
        assert size < (tmp_path / path).stat().st_size < 1.3 * size + 20_000, path


def test_a_parameter_that_is_replaced_counts():
    model = small_model()
    attention = model.vit.encoder.layer[0].attention.attention
    attention.key.weight = nn.Parameter(torch.zeros_like(attention.key.weight))
    assert not lies(model)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()).logits, apart(model)(pixels()).logits)
    model.double()
    assert lies(model)


def test_a_model_shared_between_processes_stays_shared():
    model = apart(small_model())
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    model.float()
    assert all(parameter.is_shared() for parameter in model.parameters())
    together = small_model()
    together.share_memory()
    assert lies(together)
    assert all(parameter.is_shared() for parameter in together.parameters())


def test_one_tensor_is_a_view_and_only_without_gradients():
    tensors = parameters(3, 4, 5)
    expected = torch.cat(tensors).detach()
    with torch.no_grad():
        assert as_one(tensors) is None
        lay_side_by_side(tensors)
        one = as_one(tensors)
        assert torch.equal(one, expected)
        assert one.data_ptr() == tensors[0].data_ptr()
        assert not one.requires_grad
        assert as_one(tensors[::-1]) is None
        assert as_one([tensors[0], tensors[2]]) is None
        assert torch.equal(as_one(tensors[1:]), expected[4:])
    assert as_one(tensors) is None
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in tensors)
    frozen = [tensor.requires_grad_(False) for tensor in tensors]
    assert torch.equal(as_one(frozen), expected)
    x = torch.ones(5, requires_grad=True)
    torch.nn.functional.linear(x, as_one(frozen)).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0))


def test_neighbours_by_chance_are_not_one():
    memory = bytearray(4 * 12)
    tensors = [nn.Parameter(torch.frombuffer(memory, dtype=torch.float32, count=6, offset=at)) for at in (0, 24)]
    assert tensors[0].data_ptr() + tensors[0].nbytes == tensors[1].data_ptr()
    assert not lie_side_by_side(tensors)


@pytest.mark.parametrize(
    "tensors",
    [
        [*parameters(1, 4, 5), *parameters(1, 3, 5)],
        [*parameters(1, 4, 5), nn.Parameter(torch.randn(4, 5, dtype=torch.float64))],
        [torch.randn(4, 5), torch.randn(4, 5)],
        [nn.Parameter(torch.empty(4, 5, device="meta")) for _ in range(2)],
    ],
    ids=["shapes", "dtypes", "no parameters", "meta"],
)
def test_what_cannot_be_moved_stays(tensors):
    before = [tensor.data_ptr() for tensor in tensors]
    lay_side_by_side(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert not lie_side_by_side(tensors)
