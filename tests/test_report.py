"""Classification metrics, their text report, and figures."""

import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from fastvit.errors import InputError
from fastvit.report import figures
from fastvit.report.classification import classification_metrics, confusion_matrix, format_metrics
from fastvit.report.figures import (
    attention_rollout,
    draw_attention_sheet,
    draw_example_grid,
    overlay_heatmap,
    save_image,
)

GREY = Image.new("RGB", (64, 48), (120, 120, 120))


def random_attentions(layers: int, heads: int, tokens: int, dtype=np.float32) -> np.ndarray:
    weights = np.random.default_rng(0).gamma(0.3, size=(layers, heads, tokens, tokens)) + 1e-6
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(dtype)


def measure_width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def test_importing_report_does_not_import_torch():
    code = "import sys, fastvit.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Metrics


def test_confusion_matrix_counts_true_by_predicted():
    matrix = confusion_matrix(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
    assert matrix.dtype == np.int64


def test_confusion_matrix_of_small_integer_types_does_not_overflow():
    classes = np.arange(102, dtype=np.uint8)
    assert np.array_equal(confusion_matrix(classes, classes, 102), np.eye(102))


def test_confusion_matrix_without_images_is_zero():
    assert confusion_matrix(np.array([]), np.array([]), 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], "labels and predictions: expected the same length"),
        ([0, 3], [0, 1], "labels: expected classes from 0 to 2"),
        ([0, 1], [0, -1], "predictions: expected classes from 0 to 2"),
        ([0, 1], [0.0, 1.0], "predictions: expected integers"),
    ],
)
def test_confusion_matrix_raises_for_invalid_classes(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(labels), np.array(predictions), 3)


def test_metrics_equal_their_definitions():
    confusion = np.array([[8, 2, 0], [1, 5, 4], [0, 0, 10]])
    metrics = classification_metrics(confusion)
    precision, recall = [8 / 9, 5 / 7, 10 / 14], [0.8, 0.5, 1.0]
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    assert metrics["accuracy"] == pytest.approx(23 / 30)
    assert metrics["precision"] == pytest.approx(precision)
    assert metrics["recall"] == pytest.approx(recall)
    assert metrics["f1"] == pytest.approx(f1)
    assert metrics["macro_f1"] == pytest.approx(sum(f1) / 3)
    assert metrics["support"] == [10, 10, 10]


def test_metrics_of_classes_without_images_or_predictions_are_zero():
    metrics = classification_metrics(np.array([[4, 0, 0], [1, 0, 0], [0, 0, 0]]))
    assert metrics["precision"] == [0.8, 0.0, 0.0]
    assert metrics["recall"] == [1.0, 0.0, 0.0]
    assert metrics["f1"] == pytest.approx([8 / 9, 0.0, 0.0])
    assert classification_metrics(np.zeros((2, 2), dtype=int))["accuracy"] == 0.0


def test_metrics_are_json_serialisable():
    metrics = classification_metrics(np.array([[1, 2], [3, 4]]))
    assert json.loads(json.dumps(metrics)) == metrics


@pytest.mark.parametrize("confusion", [np.zeros((2, 3), int), np.zeros((0, 0), int), np.eye(2), -np.eye(2, dtype=int)])
def test_metrics_raise_for_an_invalid_confusion_matrix(confusion):
    with pytest.raises(ValueError, match="confusion: expected"):
        classification_metrics(confusion)


def test_text_report_of_few_classes_has_metrics_and_the_confusion_matrix():
    lines = format_metrics(np.array([[98, 2], [10, 1090]]), ["rust", "healthy"]).splitlines()
    assert lines[0] == "accuracy 0.9900   macro F1 0.9684   1,200 images, 2 classes"
    assert lines[3].split() == ["0", "rust", "0.9074", "0.9800", "0.9423", "100"]
    assert lines[-2].split() == ["0", "rust", "98", "2"]
    assert lines[-1].split() == ["1", "healthy", "10", "1090"]


def test_columns_stay_aligned_with_long_and_wide_names():
    names = ["a", "콩잎 녹병", "a very long class name that goes on and on and on", "two\nlines\x07", "é" * 40]
    confusion = np.arange(25).reshape(5, 5) * 37
    text = format_metrics(confusion, names)
    table, matrix = text.split("\n\n")[1:]
    for block in (table.splitlines(), matrix.splitlines()[1:]):
        assert len({measure_width(line) for line in block}) == 1
        assert len(block) == 6
    assert "a very long class name that goe…" in text


def test_text_report_of_many_classes_has_the_worst_confusions():
    confusion = np.diag(np.full(102, 20))
    confusion[17, 3], confusion[40, 41] = 7, 5
    text = format_metrics(confusion, [f"flower {index}" for index in range(102)])
    assert "Confusion matrix" not in text
    assert max(map(len, text.splitlines())) < 100
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["flower", "17", "flower", "3", "7", "25.9%"],
        ["flower", "40", "flower", "41", "5", "20.0%"],
    ]


def test_text_report_of_many_classes_without_confusions():
    assert format_metrics(np.eye(30, dtype=int), ["x"] * 30).endswith("No confusions.")


def test_text_report_raises_for_a_wrong_number_of_names():
    with pytest.raises(ValueError, match="class_names: expected 2 names, got 1"):
        format_metrics(np.eye(2, dtype=int), ["a"])


# Figures


def list_colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors(maxcolors=2**24)}


def test_example_grid_shows_every_image_of_every_class():
    examples = {
        "one": [Image.new("RGB", (50, 50), (200, 0, 0)), Image.new("RGB", (90, 10), (0, 200, 0))],
        "two": [Image.new("RGB", (10, 90), (0, 0, 200))],
    }
    assert {(200, 0, 0), (0, 200, 0), (0, 0, 200)} <= list_colours(draw_example_grid(examples))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_example_grid_accepts_images_of_any_mode(mode):
    assert draw_example_grid({"x": [Image.new(mode, (20, 20))]}).mode == "RGB"


def test_example_grid_shows_transparency_as_white():
    clear = Image.new("RGBA", (20, 20), (0, 0, 255, 0))
    assert (0, 0, 255) not in list_colours(draw_example_grid({"x": [clear]}))


@pytest.mark.parametrize("name", ["", "콩잎 녹병", "ورقة", "🌿", "bad \udc80 bytes", "two\nlines\x00", "x" * 500])
def test_example_grid_accepts_any_class_name(name):
    assert draw_example_grid({name: [GREY]}).size == draw_example_grid({"plain": [GREY]}).size


def test_example_grid_is_limited_to_twenty_classes(monkeypatch):
    written = []
    monkeypatch.setattr(figures, "_draw_text", lambda draw, position, text, **options: written.append(text))
    sheet = draw_example_grid({f"class {index}": [GREY] for index in range(25)}, tile=32)
    assert written == [*(f"class {index}" for index in range(20)), "and 5 more classes"]
    assert sheet.height < 25 * (32 + 23 + 8)


def test_example_grid_has_a_row_for_a_class_without_images():
    assert draw_example_grid({"none": [], "some": [GREY]}).height > draw_example_grid({"some": [GREY]}).height


def test_example_grid_raises_without_classes():
    with pytest.raises(ValueError, match="examples: expected at least one class"):
        draw_example_grid({})


def test_heatmap_is_bright_for_high_and_dark_for_low_values():
    heat = np.zeros((4, 4))
    heat[0, 3] = 5
    overlay = np.asarray(overlay_heatmap(GREY, heat).convert("L"))
    assert overlay.shape == (48, 64)
    assert overlay[2, 61] > 160
    assert overlay[40, 5] < 80


def test_heatmap_lightness_increases_with_the_value():
    ramp = np.linspace(0, 1, 64)[None, :]
    lightness = np.asarray(overlay_heatmap(GREY, ramp).convert("L")).astype(int)[24]
    assert (np.diff(lightness) >= -1).all()
    assert lightness[-1] - lightness[0] > 100


def test_heatmap_is_invariant_to_scale_and_offset_and_accepts_constant_maps():
    heat = np.random.default_rng(0).random((3, 5))
    first, second = np.asarray(overlay_heatmap(GREY, heat)), np.asarray(overlay_heatmap(GREY, 1000 * heat - 70))
    assert np.abs(first.astype(int) - second).max() <= 1
    assert len(list_colours(overlay_heatmap(GREY, np.full((2, 2), 3.0)))) == 1


@pytest.mark.parametrize("heat", [np.zeros(4), np.zeros((0, 3)), np.array([[0.0, np.nan]]), np.array([[0.0, np.inf]])])
def test_heatmap_raises_for_an_invalid_map(heat):
    with pytest.raises(ValueError, match="heat: expected"):
        overlay_heatmap(GREY, heat)


def test_rollout_equals_its_definition():
    attentions = random_attentions(3, 2, 5, np.float64)
    first, second, third = (0.5 * layer.mean(axis=0) + 0.5 * np.eye(5) for layer in attentions)
    np.testing.assert_allclose(attention_rollout(attentions), third @ second @ first, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rollout_rows_sum_to_one(dtype):
    rollout = attention_rollout(random_attentions(12, 3, 17, dtype))
    assert rollout.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(rollout.sum(axis=-1), 1, rtol=1e-5)


def test_rollout_of_identity_attention_is_the_identity():
    assert np.array_equal(attention_rollout(np.broadcast_to(np.eye(4), (6, 2, 4, 4))), np.eye(4))


def test_rollout_raises_for_a_wrong_rank():
    with pytest.raises(ValueError, match=r"attentions: expected \[layers, heads, tokens, tokens\]"):
        attention_rollout(np.ones((2, 5, 5)))


@pytest.mark.parametrize("layers", [1, 2, 12, 24, 32])
def test_attention_sheet_shows_every_layer_with_its_label(layers, monkeypatch):
    written = {}
    monkeypatch.setattr(figures, "_draw_text", lambda draw, position, text, **options: written.update({text: position}))
    sheet = draw_attention_sheet(GREY, random_attentions(layers, 2, 13), (3, 4))
    large = ["image", "last layer", "rollout over all layers"]
    assert list(written) == [*large, *(f"layer {index + 1}" for index in range(layers))]
    assert len(set(written.values())) == layers + 3
    assert all(left + 128 <= sheet.width and top + 128 <= sheet.height for left, top in written.values())
    assert sheet.width <= 1000


def test_attention_sheet_is_bright_at_the_patch_that_the_class_token_attends_to():
    attentions = np.full((1, 1, 5, 5), 1e-3)
    attentions[0, 0, 0, 4] = 1  # the patch at the lower right
    sheet = np.asarray(draw_attention_sheet(Image.new("RGB", (64, 64)), attentions, (2, 2)).convert("L")).astype(int)
    layer = sheet[-8 - 128 : -8, 8 : 8 + 128]
    assert layer[-10, -10] > 100
    assert max(layer[10, 10], layer[-10, 10], layer[10, -10]) < 60


def test_attention_sheet_raises_for_a_grid_that_does_not_match_the_tokens():
    with pytest.raises(ValueError, match="grid: expected rows x columns = 12"):
        draw_attention_sheet(GREY, random_attentions(1, 1, 13), (4, 4))


# Files


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_saved_image_can_be_read_again(tmp_path, suffix, mode):
    path = tmp_path / f"sheet{suffix}"
    save_image(Image.new(mode, (20, 10)), path)
    assert Image.open(path).size == (20, 10)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["sheet", "sheet.xyz", "sheet.txt", "sheet.psd"])
def test_unknown_suffix_raises_before_anything_is_written(tmp_path, name):
    with pytest.raises(InputError, match=f"path: expected a suffix.*{name}"):
        save_image(GREY, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_raises(tmp_path):
    with pytest.raises(InputError, match="path: expected an existing folder"):
        save_image(GREY, tmp_path / "missing" / "sheet.png")


def test_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    save_image(GREY, path)
    before = path.read_bytes()

    def fail(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(Image.new("RGB", (5, 5)), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
