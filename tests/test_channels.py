"""Images of other channels than three: grey, multispectral TIFF and .npy files, from their decoding to predictions."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import fastvit
from fastvit import cli
from fastvit.data.images import array_to_image, decode_image, to_image
from fastvit.errors import InputError
from fastvit.train.finetune import main

pytestmark = pytest.mark.usefixtures("own_folder")

SHORT = ["--data-dir", "images", "--output-dir", "out", "--precision", "fp32", "--cpu", "--image-size", "16"]
SHORT += ["--max-steps", "2", "--eval-steps", "2", "--batch-size", "4"]


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [height, width, channels] as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif path.suffix == ".tif":
        kind = {"photometric": "rgb", "extrasamples": ["unspecified"]} if pixels.shape[2] == 4 else {}
        tifffile.imwrite(path, pixels, planarconfig="contig", **{"photometric": "minisblack", **kind})
    else:
        Image.fromarray(pixels[..., 0]).save(path)


def make_folder(suffix: str, channels: int, count: int = 4) -> np.ndarray:
    """Writes two classes of images, of which channel c has a mean of about 20 + 30 c; returns the pixels."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 40, (2 * count, 20, 16, channels)) + 30 * np.arange(channels)
    for index, each in enumerate(pixels.astype(np.uint8)):
        write_image(Path("images", "cat" if index % 2 else "dog", f"{index}{suffix}"), each)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize(("suffix", "channels"), [(".npy", 5), (".tif", 5), (".tif", 4), (".npy", 2), (".png", 1)])
def test_images_of_other_channels_are_decoded_as_they_are(suffix, channels):
    pixels = make_folder(suffix, channels)
    path = Path("images", "dog", f"0{suffix}")
    for source in (
        path,
        path.read_bytes(),
        pixels[0],
        torch.from_numpy(pixels[0]),
        lambda: io.BytesIO(path.read_bytes()),
    ):
        np.testing.assert_array_equal(np.asarray(to_image(source, channels=channels)), pixels[0])
    for method in ("resize", "crop"):
        given = (8, 10) if method == "resize" else (2, 3, 9, 12)
        found = np.asarray(getattr(decode_image(path, channels=channels), method)(given))
        for channel in range(channels):
            expected = getattr(Image.fromarray(pixels[0, ..., channel]), method)(given)
            np.testing.assert_array_equal(found[..., channel], np.asarray(expected))


def test_arrays_of_16_bits_and_channels_first_are_accepted():
    array = np.random.default_rng(0).integers(0, 2**16, (5, 8, 9), dtype=np.uint16)
    np.testing.assert_array_equal(np.asarray(array_to_image(array, channels=5)), np.moveaxis(array, 0, 2) // 256)


@pytest.mark.parametrize(
    ("suffix", "found", "channels", "message"),
    [
        (".npy", 5, 3, r"expected .*1, 3 or 4 channels at one end, got \[20, 16, 5\]"),
        (".npy", 5, 4, r"expected .*4 channels at one end, got \[20, 16, 5\]"),
        (".tif", 5, 4, r"expected .*4 channels at one end, got \[20, 16, 5\]"),
        (".tif", 5, 3, r"expected an image, .*; a TIFF of several bands needs --channels"),
        (".tif", 4, 3, r"expected 3 channels, found 4, of which none is alpha"),
        (".png", 1, 5, r"expected 5 channels, found 1 \(L\)"),
    ],
)
def test_images_of_wrong_channels_are_refused(suffix, found, channels, message):
    make_folder(suffix, found, count=1)
    with pytest.raises(InputError, match=rf"0\{suffix}: {message}"):
        decode_image(Path("images", "dog", f"0{suffix}"), channels=channels)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("suffix", "channels", "start"), [(".npy", 5, "scratch"), (".tif", 5, "ViT"), (".png", 1, "ViT")]
)
def test_other_channels_go_the_whole_way(suffix, channels, start, streaming, capsys):
    pixels = make_folder(suffix, channels)
    options = ["--from-scratch", "micro", "--patch-size", "8"]
    if start == "ViT":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
        before = fastvit.ViTForImageClassification(transformers.ViTConfig(**sizes))
        before.save_pretrained("before")
        options = ["--model", "before", "--freeze-backbone"]
    options += ["--channels", str(channels), "--validation-fraction", "0"]
    options += ["--streaming", "--class-names", "cat,dog"] if streaming else ["--no-augment"]
    assert main([*SHORT, *options]) == 0
    settings = json.loads(Path("out/preprocessor_config.json").read_text())
    resized = [np.asarray(to_image(each, channels=channels).resize((16, 16), 2)) / 255 for each in pixels]
    expected = pixels / 255 if streaming else np.stack(resized)
    np.testing.assert_allclose(settings["image_mean"], expected.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(settings["image_std"], expected.std((0, 1, 2)), rtol=1e-4)
    if start == "ViT":
        weight = before.vit.embeddings.patch_embeddings.projection.weight
        adapted = weight.sum(1, keepdim=True) if channels == 1 else weight[:, [0, 1, 2, 0, 1]] * 0.6
        found = load_file("out/model.safetensors")["vit.embeddings.patch_embeddings.projection.weight"]
        torch.testing.assert_close(found, adapted)
    if streaming:
        return
    capsys.readouterr()
    path = f"images/dog/0{suffix}"
    for command in (
        ["predict", "out", "images"],
        ["attention", "out", path],
        ["evaluate", "out", "--data-dir", "images"],
    ):
        assert cli.main([*command, "--device", "cpu"]) == 0
    with fastvit.Predictor("out", "cpu") as predictor, torch.no_grad():
        mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
        inputs = (torch.from_numpy(resized[0]).permute(2, 0, 1) - mean) / std
        probabilities = predictor.model(inputs[None].float()).logits.softmax(-1)[0]
        np.testing.assert_allclose(predictor(path).probabilities, probabilities, atol=1e-5)
    # A checkpoint of these channels keeps its normalisation.
    Path("images/dog/new").mkdir()
    write_image(Path(f"images/dog/new/1{suffix}"), np.full((20, 16, channels), 250, np.uint8))
    assert main([*SHORT, "--model", "out", "--channels", str(channels), "--overwrite", "--output-dir", "again"]) == 0
    assert json.loads(Path("again/preprocessor_config.json").read_text())["image_mean"] == settings["image_mean"]
    assert main([*SHORT, "--model", "out", "--overwrite"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_an_image_of_other_channels_is_named_before_training(capsys):
    make_folder(".npy", 5)
    write_image(Path("images/cat/odd.npy"), np.zeros((20, 16, 6), np.uint8))
    options = ["--from-scratch", "micro", "--patch-size", "8", "--channels", "5"]
    assert main([*SHORT, *options]) == 2
    assert (
        "odd.npy: expected [height, width], or with 5 channels at one end, got [20, 16, 6]" in capsys.readouterr().err
    )
    assert not Path("out").exists()
    for extra, message in (
        (["--randaugment", "1", "5"], "--randaugment: expected images of 3 channels, got --channels 5"),
        (["--channels", "0"], "--channels: expected at least 1, got 0"),
    ):
        assert main([*SHORT, *options, *extra]) == 2
        assert message in capsys.readouterr().err
