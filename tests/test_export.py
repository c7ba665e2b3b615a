"""`fastvit export` and the runtimes of `Predictor`: each computes what PyTorch computes, or says why it cannot."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backbones import CASES, save_checkpoint
from PIL import Image
from test_user_errors import CONFIG, NAMES, save_model
from torch import nn
from transformers import ViTImageProcessorPil

import fastvit
from fastvit import InputError, Predictor, cli
from fastvit.adapters import backbones
from fastvit.cli import parsers
from fastvit.data import images
from fastvit.serve import engines
from fastvit.serve.export import export_model, resolve_format

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"export needs the package {package}")

# file, dtype -> largest difference of a probability
FILES = {
    ("a.onnx", "fp16"): 3e-3, ("a.onnx", "int8"): 0.05, ("a.pt2", "bf16"): 2e-2,
    ("a.xml", "fp16"): 3e-3, ("a.xml", "bf16"): 2e-2, ("a.xml", "int8"): 0.05,
}  # fmt: skip
SAME_OPERATIONS = ("ViT", "DeiT", "I-JEPA", "DINOv2", "BEiT shared", "CLIP vision")  # as those of another family
GREY = {"image_mean": [0.4], "image_std": [0.3]}


@pytest.fixture(autouse=True)
def chosen_by_arguments(monkeypatch):
    monkeypatch.delenv("FASTVIT_RUNTIME")  # of conftest.py


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A calibrated classifier whose classes differ."""
    folder = save_model(tmp_path_factory.mktemp("model"), calibration_temperature=0.25)
    loaded = fastvit.ViTForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loaded.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An evaluation set: drawn images, one folder per class."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(NAMES):
        (root / name).mkdir()
        for seed in range(3):
            pixels = np.random.default_rng(10 * label + seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((100, 90)).save(root / name / f"{seed}.jpg")
    return root


@pytest.fixture(scope="module")
def files(photos):
    return sorted(str(path) for path in photos.rglob("*.jpg"))


@pytest.fixture(scope="module")
def expected(model, files):
    with Predictor(model, "cpu", runtime="torch") as predictor:
        return np.array([result.probabilities for result in predictor(files)])


def predict(model, files, **options):
    with Predictor(model, "cpu", **options) as predictor:
        assert predictor.class_names == list(NAMES)
        return np.array([result.probabilities for result in predictor(files)])


@pytest.mark.parametrize(("name", "dtype"), FILES)
def test_exported_file_predicts_as_the_model(name, dtype, model, photos, files, expected, tmp_path, capsys):
    if (name, dtype) == ("a.xml", "bf16") and (reason := engines.find_dtype_reason("openvino", torch.bfloat16)):
        pytest.skip(reason)
    arguments = ["export", model, "-o", str(tmp_path / name), "--dtype", dtype]
    arguments += ["--calibrate", str(photos)] if dtype == "int8" else []
    arguments += ["--data-dir", str(photos), "--max-loss", "40"] if name == "a.xml" else []
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert f"written: {tmp_path / name}" in output and ("accuracy" in output) == (name == "a.xml")
    assert {path.suffix for path in tmp_path.iterdir()} == {Path(name).suffix, *([".bin"] if name == "a.xml" else [])}
    for runtime in ("openvino", "onnxruntime") if name == "a.onnx" else ("auto",):
        found = predict(tmp_path / name, files, runtime=runtime)
        np.testing.assert_allclose(found, expected, atol=FILES[name, dtype])
        assert not np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "a.xml") for family in CASES if family not in SAME_OPERATIONS),
        ("DINOv3 ViT", "a.onnx"),
    ],
)
def test_every_family_is_exported(family, name, tmp_path):
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    built = backbones.build_classifier(str(save_checkpoint(family, tmp_path / "checkpoint")), labels)
    built.save_pretrained(tmp_path / "model")
    (tmp_path / "checkpoint" / "preprocessor_config.json").rename(tmp_path / "model" / "preprocessor_config.json")
    difference, scale = export_model(
        str(tmp_path / "model"), tmp_path / name, resolve_format(tmp_path / name, None, "fp32")
    )
    assert difference < 1e-5 * max(1, scale) and (tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("name", "names", "options", "processor"),
    [
        ("a.pt2", NAMES, {"problem_type": "multi_label_classification", "label_thresholds": [0.9, 0.1, 0.5]}, {}),
        ("a.xml", NAMES[:1], {}, {}),
        ("a.pt2", NAMES[:2], {"problem_type": "regression"}, {}),
        ("a.onnx", NAMES, {"num_channels": 1, "image_size": [32, 64]}, {"size": {"height": 32, "width": 64}, **GREY}),
    ],
    ids=["several labels", "one logit", "regression", "grey, not square"],
)
def test_exported_file_has_the_task_and_the_input_of_the_model(name, names, options, processor, files, tmp_path):
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    torch.manual_seed(0)
    config = fastvit.ViTConfig(**{**CONFIG, **labels, **options})
    fastvit.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(**{"size": {"height": 32, "width": 32}, **processor}).save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / name, resolve_format(tmp_path / name, None, "fp32"))
    with Predictor(tmp_path / "model", "cpu", runtime="torch") as ours, Predictor(tmp_path / name, "cpu") as exported:
        expected, found = ours(files[0]), exported(files[0])
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)
    assert exported.task is ours.task and exported.preprocessor == ours.preprocessor
    np.testing.assert_array_equal(exported.thresholds, ours.thresholds)
    assert [label for label, _ in found.selected] == [label for label, _ in expected.selected]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("-o a.onnx --dtype bf16", "--dtype: onnx cannot be bf16: ONNX Runtime has no bfloat16"),
        ("-o a.pt2 --dtype int8 --calibrate photos", "--dtype: torch-export cannot be int8"),
        ("-o a.onnx --dtype int8", "--calibrate: expected images with --dtype int8"),
        ("-o a.onnx --calibrate photos", "--calibrate: expected images with --dtype int8"),
        ("-o a.bin", "--output: expected a file ending in .onnx (onnx), .xml (openvino)"),
        ("-o a.xml --format onnx", "--output: expected a file ending in .onnx, got a.xml"),
        ("-o a.engine", "--format: tensorrt: tensorrt is not installed: pip install"),
        ("-o a.onnx --max-loss 1", "--max-loss: expected an evaluation set"),
        ("-o a.onnx --max-loss=-1 --data-dir photos", "--max-loss: expected 0 or more"),
        ("-o old.onnx", "--output: old.onnx exists already"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments, error, model, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "tensorrt" else True)
    Path("photos").symlink_to(photos)
    Path("old.onnx").touch()
    assert cli.main(["export", model, *arguments.split()]) == 2
    assert error in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"photos", "old.onnx"}


@pytest.mark.parametrize("cause", ["accuracy", "logits"])
def test_no_file_is_written_that_is_worse(cause, model, photos, tmp_path, monkeypatch, capsys):
    class Wrong(nn.Module):
        def __init__(self, classifier):
            super().__init__()
            self.classifier = classifier

        def forward(self, pixel_values):
            return self.classifier(255 - pixel_values)

    trace = engines.trace_classifier
    if cause == "logits":
        monkeypatch.setattr(engines, "trace_classifier", lambda classifier, size: trace(Wrong(classifier), size))
    else:
        answers = iter(([0, 1, 2], [2, 1, 0]))
        fake = SimpleNamespace(name="photos", splits={"train": None})
        monkeypatch.setattr("fastvit.cli.export.load_split", lambda options, predictor: (fake, "train", np.arange(3)))
        monkeypatch.setattr("fastvit.cli.export.predict_split", lambda predictor, split: (0, np.eye(3)[next(answers)]))
    assert cli.main(["export", model, "-o", str(tmp_path / "a.pt2"), "--data-dir", str(photos), "--max-loss", "5"]) == 2
    expected = {"accuracy": "at most 5 points, lost 66.67", "logits": "expected the logits of the model"}[cause]
    assert expected in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Runtimes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_runtime_computes_as_pytorch(runtime, model, files, expected):
    flipped = predict(model, files, runtime="torch", flip=True)
    assert not np.allclose(flipped, expected, atol=1e-3)
    np.testing.assert_allclose(predict(model, files, runtime=runtime, flip=True, max_batch=4), flipped, atol=1e-5)


def test_auto_is_openvino_in_the_dtype_of_the_weights(model, files, expected, caplog):
    with caplog.at_level(logging.INFO, "fastvit"):
        found = predict(model, files)
    assert "openvino computes the model in torch.float32" in caplog.text
    np.testing.assert_allclose(found, expected, atol=1e-5)  # its own default would be bfloat16 on some CPUs


@pytest.mark.parametrize("cause", ["a loaded model", "float16", "a GPU", "not installed", "the environment"])
def test_auto_is_pytorch_where_openvino_does_not_fit(cause, monkeypatch):
    device, dtype = torch.device("cuda" if cause == "a GPU" else "cpu"), torch.float32
    if cause == "not installed":
        monkeypatch.setattr(engines, "find_spec", lambda name: None)
    if cause == "the environment":
        monkeypatch.setenv("FASTVIT_RUNTIME", "torch")
    dtype = torch.float16 if cause == "float16" else torch.float32
    assert engines.choose_runtime("auto", device, dtype, cause == "a loaded model") == "torch"
    if cause in ("float16", "a GPU", "not installed"):
        with pytest.raises(InputError, match=r"runtime: openvino .*(float16|CPU|pip install)"):
            engines.choose_runtime("openvino", device, dtype, False)


@pytest.mark.parametrize(
    ("model", "runtime", "count", "expected"),
    [
        ("m", "auto", 9, "torch"),
        ("m", "auto", 900, "auto"),
        ("m", "openvino", 9, "openvino"),
        ("m.xml", "auto", 9, "auto"),
    ],
)
def test_commands_convert_a_checkpoint_for_many_images_only(model, runtime, count, expected):
    assert parsers.choose_runtime(SimpleNamespace(model=model, runtime=runtime), count) == expected


def test_a_model_that_cannot_be_converted_is_computed_by_pytorch_with_a_warning(
    model, files, expected, monkeypatch, caplog
):
    def fail(classifier, image_shape):
        raise RuntimeError("No conversion rule found for operations: aten::new")

    monkeypatch.setattr(engines, "trace_classifier", fail)
    np.testing.assert_allclose(predict(model, files), expected, atol=1e-6)
    assert "cannot be converted for openvino (RuntimeError: No conversion rule" in caplog.text
    with pytest.raises(InputError, match="runtime: openvino cannot compute this model"):
        Predictor(model, "cpu", runtime="openvino")


@pytest.fixture(scope="module")
def graph(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "a.onnx"
    assert cli.main(["export", model, "-o", str(path)]) == 0
    return path


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("count", [1, 5])
def test_onnx_file_in_float32_computes_as_pytorch(runtime, count, graph, files, expected):
    np.testing.assert_allclose(predict(graph, files[:count], runtime=runtime), expected[:count], atol=1e-5)


def test_exported_files_refuse_what_does_not_fit(graph, files, tmp_path, capsys):
    for options, error in (
        ({"runtime": "torch"}, "runtime: expected openvino or onnxruntime for .*, got 'torch'"),
        ({"dtype": "bfloat16", "runtime": "onnxruntime"}, "dtype: expected None"),
        ({"image_processor": object()}, "image_processor: expected None"),
        ({"device": "meta"}, "device: expected cpu"),
    ):
        with pytest.raises(InputError, match=error):
            Predictor(graph, **options)
    with pytest.raises(InputError, match=r"no such file: '.*b\.onnx'; did you mean '.*a\.onnx'"):
        Predictor(str(graph.with_name("b.onnx")))
    assert cli.main(["attention", str(graph), files[0], "-o", str(tmp_path / "map.png")]) == 2
    assert "attention maps need a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (None, "found no class names in its metadata"),
        ({"class_names": "[1, 2]"}, "class_names: expected a list of names"),
        ({"class_names": "[]"}, "class_names: expected a list of names"),
        ({"preprocessing": "{}"}, "invalid metadata"),
        ({"temperature": "no number"}, "invalid metadata"),
        ({"preprocessing": '{"resize": 1e9, "crop": null}'}, "image_size: expected"),
    ],
)
def test_metadata_of_a_stranger_is_checked(changes, error, graph, tmp_path):
    metadata = dict(engines.read_metadata(graph, "onnxruntime"))
    assert json.loads(metadata["class_names"]) == list(NAMES) and json.loads(metadata["temperature"]) == 0.25
    assert engines.read_metadata(graph, "openvino") == metadata
    with pytest.raises(InputError, match=error):
        engines.parse_metadata({} if changes is None else {**metadata, **changes}, Path("x.onnx"))


def test_a_damaged_file_is_an_error_of_one_line(graph, tmp_path, files, capsys):
    for suffix in (".onnx", ".xml", ".pt2"):
        damaged = tmp_path / f"damaged{suffix}"
        damaged.write_bytes(graph.read_bytes()[:500])
        assert cli.main(["predict", str(damaged), files[0], "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert f"{damaged}: cannot be loaded" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("threads", "cpus", "load", "advice"), [(8, 2, 0, 2), (2, 2, 9, 1), (2, 2, 1, 0), (1, 2, 9, 0)]
)
def test_threads_that_wait_for_each_other_are_noticed(threads, cpus, load, advice, monkeypatch, caplog):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(engines, "count_cpus", lambda: cpus)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    engines.warn_of_oversubscription()
    assert (f"set OMP_NUM_THREADS={advice}" in caplog.text) == bool(advice) == bool(caplog.text)
    assert engines.choose_threads() == min(threads, cpus)


@pytest.mark.parametrize(("quota", "cpus"), [("max 100000", 4), ("150000 100000", 1), ("900000 100000", 4), ("", 4)])
def test_cpus_are_those_of_the_control_group(quota, cpus, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: quota)
    assert engines.count_cpus() == cpus


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def test_large_jpegs_are_decoded_at_a_reduced_size(model, tmp_path, monkeypatch):
    """The model's images have 32 pixels: 400 x 300 are decoded as 200 x 150, of which each side is at least 96."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)).resize((400, 300), 3).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    sizes, convert = [], images.convert_to_upright
    monkeypatch.setattr(images, "convert_to_upright", lambda image, n: sizes.append(image.size) or convert(image, n))
    options = {"runtime": "torch"}
    with Predictor(model, "cpu", **options) as exact, Predictor(model, "cpu", fast_jpeg=True, **options) as fast:
        for source in (tmp_path / "a.jpg", content, lambda: content):
            first, second = exact(source), fast(source)
            assert not np.array_equal(first.probabilities, second.probabilities)
            np.testing.assert_allclose(first.probabilities, second.probabilities, atol=0.05)
        fast([tmp_path / "a.jpg"])
    assert sizes == [(400, 300), (200, 150)] * 3 + [(200, 150)]
