"""Drawn leaves: reproducible, balanced, with the lesions of their labels, and not separable by their mean colour."""

import numpy as np
import pytest

from fastvit.data.leaves import CLASSES, draw_leaf, draw_leaves
from fastvit.errors import InputError


def pixels(label: str, seed: int, size: int = 64) -> np.ndarray:
    return np.asarray(draw_leaf(label, seed=seed, size=size)).astype(np.float32)


def lesion_pixels(label: str, seed: int, size: int = 224) -> np.ndarray:
    """Colours [n, 3] of the pixels that the disease changed strongly, without the halos."""
    sick, healthy = pixels(label, seed, size), pixels("healthy", seed, size)
    return sick[np.abs(sick - healthy).max(axis=2) > 60]


def test_classes_match_the_beans_dataset_and_its_order():
    assert CLASSES == ("angular_leaf_spot", "bean_rust", "healthy")


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("size", [16, 64, 65, 224])
def test_image_has_the_requested_size_and_mode(label, size):
    image = draw_leaf(label, seed=3, size=size)
    assert image.mode == "RGB"
    assert image.size == (size, size)


@pytest.mark.parametrize("label", CLASSES)
def test_same_label_and_seed_draw_the_same_image(label):
    assert np.array_equal(pixels(label, 7), pixels(label, 7))


@pytest.mark.parametrize("label", CLASSES)
def test_another_seed_draws_another_image(label):
    assert np.abs(pixels(label, 7) - pixels(label, 8)).mean() > 5


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("seed", range(5))
def test_image_is_the_same_at_any_size_up_to_resampling(label, seed):
    large = np.asarray(draw_leaf(label, seed=seed, size=256).reduce(4)).astype(np.float32)
    small = pixels(label, seed, 64)
    other_leaf = pixels(label, seed + 100, 64)
    assert np.abs(large - small).mean() < 6
    assert np.abs(large - small).mean() < np.abs(large - other_leaf).mean() / 4


@pytest.mark.parametrize("label", ["angular_leaf_spot", "bean_rust"])
def test_only_lesions_distinguish_sick_leaves_from_healthy_ones(label):
    for seed in range(20):
        changed = np.abs(pixels(label, seed) - pixels("healthy", seed)).max(axis=2) > 2
        assert 0.005 < changed.mean() < 0.6
        assert not changed[0].all()
        corners = changed[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.sum() <= 1, "the background changed with the class"


def test_rust_leaf_has_reddish_orange_spots():
    for seed in range(12):
        rust, healthy = pixels("bean_rust", seed, 224), pixels("healthy", seed, 224)
        redder = (rust[..., 0] - rust[..., 1]) - (healthy[..., 0] - healthy[..., 1]) > 50
        red, green, blue = np.median(rust[redder], axis=0)
        assert redder.mean() > 0.002
        assert red > 1.3 * green > 1.1 * blue


def test_angular_spots_are_brown_to_grey_and_less_colourful_than_rust():
    def colourfulness(label: str) -> float:
        colours = np.concatenate([lesion_pixels(label, seed) for seed in range(12)])
        return float(np.mean(colours.max(axis=1) - colours.min(axis=1)))

    assert colourfulness("angular_leaf_spot") < 0.8 * colourfulness("bean_rust")


def test_angular_spots_are_larger_and_fewer_than_pustules():
    def share_of_inner_pixels(label: str) -> float:
        inner = total = 0
        for seed in range(12):
            changed = np.abs(pixels(label, seed, 224) - pixels("healthy", seed, 224)).max(axis=2) > 60
            reach = 4
            shifted = [np.roll(changed, (dy, dx), (0, 1)) for dy in (-reach, reach) for dx in (-reach, reach)]
            inner += np.logical_and.reduce([changed, *shifted]).sum()
            total += changed.sum()
        return inner / total

    assert share_of_inner_pixels("angular_leaf_spot") > 2 * share_of_inner_pixels("bean_rust")


@pytest.mark.parametrize("num_images", [0, 1, 30, 100])
def test_generated_classes_are_balanced(num_images):
    images, labels = draw_leaves(num_images, image_size=16)
    assert images.shape == (num_images, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (num_images,)
    assert labels.dtype == np.int64
    counts = np.bincount(labels, minlength=3)
    assert counts.max() - counts.min() <= 1


def test_generated_labels_are_shuffled_by_the_seed():
    labels = draw_leaves(60, image_size=16, seed=0)[1]
    assert not np.array_equal(labels, np.arange(60) % 3)
    assert not np.array_equal(labels, draw_leaves(60, image_size=16, seed=1)[1])


def test_generated_dataset_is_the_same_for_the_same_seed():
    first, second = draw_leaves(12, image_size=32, seed=5), draw_leaves(12, image_size=32, seed=5)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_no_two_generated_images_are_equal_within_or_between_seeds():
    images = np.concatenate([draw_leaves(60, image_size=16, seed=seed)[0] for seed in range(3)])
    assert len({image.tobytes() for image in images}) == 180


def test_mean_colour_does_not_reveal_the_class():
    def mean_colours(seed: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = draw_leaves(600, image_size=16, seed=seed)
        means = images.reshape(600, -1, 3).mean(axis=1) / 255
        return np.hstack([means, means**2, np.ones((600, 1))]), labels

    features, labels = mean_colours(0)
    weights = np.linalg.lstsq(features, np.eye(3)[labels], rcond=None)[0]
    held_out, held_out_labels = mean_colours(1)
    assert ((held_out @ weights).argmax(axis=1) == held_out_labels).mean() < 0.55


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"label": "mildew", "seed": 0}, "label"),
        ({"label": "healthy", "seed": -1}, "seed"),
        ({"label": "healthy", "seed": 1.5}, "seed"),
        ({"label": "healthy", "seed": 0, "size": 15}, "size"),
    ],
)
def test_bad_argument_of_draw_leaf_is_named(arguments, name):
    with pytest.raises(InputError, match=f"^{name}: expected .*got"):
        draw_leaf(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_images": -1}, "num_images"),
        ({"num_images": 2**32 + 1}, "num_images"),
        ({"num_images": 3, "image_size": 0}, "image_size"),
        ({"num_images": 3, "seed": -2}, "seed"),
    ],
)
def test_bad_argument_of_draw_leaves_is_named(arguments, name):
    with pytest.raises(InputError, match=f"^{name}: expected .*got"):
        draw_leaves(**arguments)
