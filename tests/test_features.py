"""Features and intermediate layers are the model's hidden states, and no more than the requested is computed."""

import pytest
import torch
import transformers
from test_mixed_sizes import CONFIG, DEVICE, build_small, make_images
from test_modeling import build_pair, relative_error
from torch import Tensor

import fastvit
from fastvit.models import fused

MODELS = [fastvit.ViTModel, fastvit.ViTForImageClassification, fastvit.ViTForMaskedImageModeling]
SIZES = [(32, 32), (16, 40), (37, 21)]
GRIDS = [(4, 4), (2, 5), (4, 2)]
WIDTH, BLOCKS = CONFIG["hidden_size"], CONFIG["num_hidden_layers"]


def make_batch(size=(24, 40)) -> Tensor:
    return torch.stack(make_images([size, size]))


def record_block_tokens(run) -> list[int]:
    """Record the number of tokens that each block computes in `run()`. A hook would make the last block compute all."""
    seen, compute = [], fused.compute_block

    def count(*args):
        stream, probabilities = compute(*args)
        seen.append(stream.branch.shape[1])
        return stream, probabilities

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "compute_block", count)
        run()
    return seen


@pytest.mark.parametrize("model_class", MODELS)
def test_features_are_the_tokens_of_the_backbone(model_class):
    model = build_small(model_class).eval()
    features = model.forward_features(make_batch())
    tokens = model.base_model(make_batch(), interpolate_pos_encoding=True).last_hidden_state
    assert isinstance(features, fastvit.Features) and features.grid == (3, 5)
    assert torch.equal(features.tokens, tokens)
    assert torch.equal(features.cls_token, tokens[:, 0])
    assert torch.equal(features.patch_tokens, tokens[:, 1:])
    assert torch.equal(features.mean, tokens[:, 1:].mean(1))
    assert features.patch_map.shape == (2, WIDTH, 3, 5)
    for row in range(3):
        for column in range(5):
            assert torch.equal(features.patch_map[:, :, row, column], tokens[:, 1 + row * 5 + column])


def test_features_of_a_list_equal_each_image_alone():
    model = build_small(fastvit.ViTForImageClassification).eval()
    features = model.forward_features(make_images(SIZES))
    assert features.grid == GRIDS
    assert features.cls_token.shape == features.mean.shape == (3, WIDTH)
    for index, image in enumerate(make_images(SIZES)):
        own = model.forward_features(image[None])
        for name in ("tokens", "patch_tokens", "patch_map", "cls_token", "mean"):
            found, expected = getattr(features, name)[index], getattr(own, name)[0]
            assert found.shape == expected.shape and relative_error(found, expected) < 1e-5, name
        assert (
            relative_error(model.classifier(features.cls_token)[index], model(make_images(SIZES)).logits[index]) < 1e-5
        )


@pytest.mark.parametrize("given", [make_batch(), make_images(SIZES)], ids=["batch", "list"])
def test_class_token_only_reduces_the_last_block(given):
    model = build_small(fastvit.ViTModel).eval()
    whole = model.forward_features(given)
    found = []
    shapes = record_block_tokens(lambda: found.append(model.forward_features(given, class_token_only=True)))
    assert len(shapes) == BLOCKS and shapes[-1] == 1 and min(shapes[:-1]) > 1
    assert relative_error(found[0].cls_token, whole.cls_token) < 1e-5
    for name in ("patch_tokens", "patch_map", "mean"):
        with pytest.raises(fastvit.InputError, match="expected patch tokens, got the class token alone"):
            getattr(found[0], name)


def test_other_arguments_are_passed_to_the_model():
    model = build_small(fastvit.ViTForMaskedImageModeling).eval()
    with torch.no_grad():
        model.vit.embeddings.mask_token.fill_(0.5)
    mask = torch.ones(2, 15, dtype=torch.bool, device=DEVICE)
    masked = model.forward_features(make_batch(), bool_masked_pos=mask)
    expected = model.vit(make_batch(), bool_masked_pos=mask, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(masked.tokens, expected)


def test_intermediate_layers_equal_transformers_hidden_states(tmp_path):
    ours, theirs = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=32, patch_size=8)
    pixels = torch.stack([image.cpu() for image in make_images([(32, 32)] * 2)])
    states = theirs(pixels, output_hidden_states=True).hidden_states
    assert isinstance(theirs, transformers.ViTForImageClassification) and len(states) == 4
    for norm in (True, False):
        found = ours.get_intermediate_layers(pixels, n=3, return_class_token=True, norm=norm)
        assert len(found) == 3
        for (patches, class_token), state in zip(found, states[1:], strict=True):
            expected = theirs.vit.layernorm(state) if norm else state
            assert relative_error(patches, expected[:, 1:]) < 1e-5
            assert relative_error(class_token, expected[:, 0]) < 1e-5


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("given", [make_batch(), make_images(SIZES)], ids=["batch", "list"])
def test_intermediate_layers_in_every_form_equal_hidden_states(given, norm):
    model = build_small(fastvit.ViTModel).eval()
    states = model(given, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    grids = GRIDS if isinstance(given, list) else [(3, 5)] * 2
    for n, depths in ((1, [3]), (2, [2, 3]), ([0], [1]), ([0, 2], [1, 3]), ((-3, -2), [1, 2])):
        maps = model.get_intermediate_layers(given, n, reshape=True, return_class_token=True, norm=norm)
        flat = model.get_intermediate_layers(given, n, norm=norm)
        assert isinstance(flat, tuple) and len(maps) == len(flat) == len(depths)
        for (patch_map, class_token), patches, depth in zip(maps, flat, depths, strict=True):
            assert class_token.shape == (len(grids), WIDTH)
            for index, grid in enumerate(grids):
                expected = model.layernorm(states[depth][index]) if norm else states[depth][index]
                assert relative_error(class_token[index], expected[0]) < 1e-5
                assert relative_error(patches[index], expected[1:]) < 1e-5
                assert patch_map[index].shape == (WIDTH, *grid)
                assert relative_error(patch_map[index].flatten(1).t(), expected[1:]) < 1e-5


def test_blocks_after_the_last_requested_are_not_computed():
    model = build_small(fastvit.ViTForImageClassification).eval()
    for n, count in (([0], 1), ([0, 1], 2), (1, BLOCKS)):
        assert len(record_block_tokens(lambda n=n: model.get_intermediate_layers(make_batch(), n))) == count
    assert record_block_tokens(lambda: model.vit(make_batch(), interpolate_pos_encoding=True, num_blocks=2)) == [16, 16]


def test_gradients_flow_through_features():
    model = build_small(fastvit.ViTForImageClassification)
    for given in (make_batch(), make_images(SIZES)):
        features = model.forward_features(given)
        (first,) = model.get_intermediate_layers(given, [0], return_class_token=True)
        (features.mean.square().sum() + features.cls_token.square().sum() + first[1].square().sum()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all((gradient is None) == name.startswith("classifier") for name, gradient in gradients.items())
        model.zero_grad()


def test_hidden_state_does_not_depend_on_which_others_are_requested():
    """A block leaves its last residual add to the next block, unless its hidden state is requested."""
    model = build_small(fastvit.ViTModel).eval()
    pixels = make_batch((32, 32))
    every = model(pixels, output_hidden_states=True)
    for index in range(BLOCKS + 1):
        one = model(pixels, output_hidden_states=index if index == 0 else [index])
        torch.testing.assert_close(one.hidden_states[index], every.hidden_states[index])
        torch.testing.assert_close(one.last_hidden_state, every.last_hidden_state)
        assert [state is not None for state in one.hidden_states] == [i == index for i in range(BLOCKS + 1)]


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (0, "n: expected 1 to 3 blocks, got 0"),
        (4, "n: expected 1 to 3 blocks, got 4"),
        ([], "n: expected increasing block indices from 0 to 2, got []"),
        ([3], "got [3]"),
        ([-4], "got [-4]"),
        ([1, 0], "got [1, 0]"),
        ([2, -1], "got [2, -1]"),
    ],
)
def test_wrong_block_indices_raise_an_error_that_describes_them(n, message):
    with pytest.raises(fastvit.InputError) as error:
        build_small(fastvit.ViTModel).get_intermediate_layers(make_batch(), n)
    assert message in str(error.value)


def test_wrong_number_of_blocks_is_an_error():
    for count in (-1, 4):
        with pytest.raises(fastvit.InputError, match=f"num_blocks: expected 0 to 3, got {count}"):
            build_small(fastvit.ViTModel)(make_batch((32, 32)), num_blocks=count)
