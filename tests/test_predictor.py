"""The predictor: results, forms of images, errors, and use from many threads."""

import gc
import io
import json
import os
import signal
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTImageProcessorPil

import fastvit
from fastvit import InputError, Prediction, Predictor, cli
from fastvit.data import images, leaves
from fastvit.data.images import to_image
from fastvit.serve.preprocessing import Preprocessor, load_preprocessor
from fastvit.serve.runner import WARM_UP_CALLS

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LABELS = {index: f"class {index}" for index in range(7)}
ODD = {"image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.25, 0.3]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vit_config(**options):
    return ViTConfig(**SMALL, image_size=32, patch_size=8, id2label=LABELS, **options)


def randomize(model):
    """Make the weights large enough for classes to differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its image processor, as saved by `fastvit finetune`, and image files of several modes."""
    root = tmp_path_factory.mktemp("model")
    randomize(fastvit.ViTForImageClassification(vit_config())).save_pretrained(root)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, **ODD).save_pretrained(root)
    image = leaves.draw_leaf("bean_rust", seed=1, size=48)
    image.save(root / "rgb.png")
    image.resize((70, 31)).save(root / "wide.jpg")
    image.convert("L").save(root / "grey.png")
    image.convert("P").save(root / "palette.gif")
    image.convert("CMYK").save(root / "cmyk.jpg")
    transparent = image.copy()
    transparent.putalpha(255)  # opaque: we put transparent areas on white, transformers drops the alpha channel
    transparent.save(root / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.resize((40, 64)).save(root / "sideways.jpg", exif=exif)
    return root


@pytest.fixture(scope="module")
def files(folder):
    return sorted(str(path) for kind in ("png", "jpg", "gif") for path in folder.glob(f"*.{kind}"))


@pytest.fixture(scope="module")
def predictor(folder):
    with Predictor(folder, "cpu", max_batch=4) as predictor:
        yield predictor


def pipeline(model, processor):
    """The pipeline of transformers; the processor resizes with Pillow even if torchvision is installed."""
    return transformers.pipeline("image-classification", model, image_processor=processor, device="cpu")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(str(folder), ViTImageProcessorPil.from_pretrained(folder))


def list_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastvit-")]


def assert_same(predictions, answers, tolerance=1e-5):
    """Check predictions against results of transformers' pipeline."""
    assert len(predictions) == len(answers)
    for prediction, answer in zip(predictions, answers, strict=True):
        assert [label for label, _ in prediction.top] == [each["label"] for each in answer]
        assert [score for _, score in prediction.top] == pytest.approx(
            [each["score"] for each in answer], abs=tolerance
        )
        assert (prediction.label, prediction.score) == prediction.top[0]
        assert prediction.probabilities.dtype == np.float32
        assert sorted(prediction.probabilities)[-len(prediction.top) :] == [s for _, s in reversed(prediction.top)]


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def test_predictions_equal_the_transformers_pipeline(predictor, pipe, files):
    assert_same(predictor(files), pipe(files))
    assert_same([predictor(files[0])], [pipe(files[0])])
    assert predictor([]) == []
    assert abs(predictor(files[0]).probabilities.sum() - 1) < 1e-6


PROCESSORS = {
    "ViT": lambda: ViTImageProcessorPil(size={"height": 24, "width": 32}, resample=3, **ODD),
    "no normalisation": lambda: ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False),
    "another factor": lambda: ViTImageProcessorPil(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, **ODD),
    "no factor": lambda: ViTImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False, **ODD),
    "DeiT": lambda: transformers.DeiTImageProcessorPil(
        size={"height": 36, "width": 37}, crop_size={"height": 32, "width": 31}
    ),
    "Bit": lambda: transformers.BitImageProcessorPil(size={"shortest_edge": 41}, crop_size={"height": 32, "width": 32}),
    "crop larger than the image": lambda: transformers.BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 33, "width": 32}
    ),
    "crop alone": lambda: transformers.DeiTImageProcessorPil(do_resize=False, crop_size={"height": 40, "width": 40}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_preprocessor_equals_the_image_processor(kind):
    processor = PROCESSORS[kind]()
    preprocessor = Preprocessor.from_processor(processor)
    for width, height in ((48, 48), (31, 77), (150, 20), (1, 5)):
        image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels = preprocessor(image)
        assert pixels.dtype == np.uint8 and pixels.shape[:2] == preprocessor.image_size
        expected = processor(images=image, return_tensors="np").pixel_values[0]
        mean, std = (np.array(values)[:, None, None] for values in (preprocessor.mean, preprocessor.std))
        np.testing.assert_allclose((np.moveaxis(pixels, 2, 0) / 255 - mean) / std, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["no normalisation", "another factor", "no factor"])
def test_predictor_applies_other_normalisations(kind, folder, files):
    processor = PROCESSORS[kind]()
    pipe = pipeline(str(folder), processor)
    with Predictor(folder, "cpu", image_processor=processor) as predictor:
        assert_same(predictor(files), pipe(files), tolerance=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 32}}, "one height and width, got size 32 and crop_size None"),
        ({"do_resize": False}, "one height and width"),
        ({"do_pad": True}, "do_pad"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "expected 3 finite numbers"),
        ({"size": {"longest_edge": 30, "shortest_edge": 20}}, "size: expected height and width, or shortest_edge"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "got 'ConvNextImageProcessor'"),
    ],
)
def test_unsupported_image_processor_settings_raise(settings, message):
    processor = ViTImageProcessorPil().to_dict() | settings
    with pytest.raises(InputError, match="image processor") as caught:
        Preprocessor.from_processor(SimpleNamespace(to_dict=lambda: processor))
    assert message in str(caught.value)


def test_preprocessor_is_loaded_from_preprocessor_config(tmp_path):
    settings = {"feature_extractor_type": "DeiTFeatureExtractor", "size": 40, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    preprocessor = load_preprocessor(str(tmp_path))
    expected = transformers.DeiTImageProcessorPil(size=40, crop_size=32)
    assert preprocessor == Preprocessor.from_processor(expected) and preprocessor.resize == (40, 40)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, "resample": 3}))
    assert load_preprocessor(str(tmp_path)) == Preprocessor.from_processor(ViTImageProcessorPil(size=32, resample=3))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "LevitImageProcessor"}))
    with pytest.raises(InputError, match=r"expected one for ViT, .*, got 'LevitImageProcessor'"):
        load_preprocessor(str(tmp_path))


def test_multi_label_scores_are_independent(folder, files):
    model = fastvit.ViTForImageClassification.from_pretrained(folder)
    model.config.problem_type = "multi_label_classification"
    pipe = pipeline(model, ViTImageProcessorPil.from_pretrained(folder))
    with Predictor(model, top_k=2) as predictor:
        assert_same(predictor(files), pipe(files, top_k=2))
        assert abs(predictor(files[0]).probabilities.sum() - 1) > 1e-3


def dinov2():
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, id2label=LABELS
    )
    return randomize(transformers.Dinov2ForImageClassification(config))


@pytest.mark.parametrize("kind", ["transformers", "DINOv2", "optimized DINOv2"])
def test_predictor_accepts_loaded_models_of_transformers(kind, folder, files, pipe):
    if kind == "transformers":
        model, processor = transformers.ViTForImageClassification.from_pretrained(folder), None
    else:
        model = dinov2()
        processor = transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
        pipe = pipeline(model, processor)
    answers = pipe(files)
    if kind == "optimized DINOv2":
        assert len(fastvit.optimize(model).replaced) == 2
    with Predictor(model, image_processor=processor) as predictor:
        assert_same(predictor(files), answers)


def test_dtype_casts_the_weights_and_probabilities_are_float32(folder, files, predictor):
    with Predictor(folder, "cpu", "bfloat16") as half:
        assert half.model.dtype == torch.bfloat16
        for one, other in zip(half(files), predictor(files), strict=True):
            assert np.abs(one.probabilities - other.probabilities).max() < 0.05
            assert one.probabilities.dtype == np.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_gpu_predictions_equal_cpu_predictions(graphs, folder, files, predictor):
    with Predictor(folder, "cuda", max_batch=4, cuda_graphs=graphs) as on_gpu:
        for _ in range(WARM_UP_CALLS + 2):
            for count in (1, 3, len(files)):
                pairs = zip(on_gpu(files[:count]), predictor(files[:count]), strict=True)
                assert all(np.abs(one.probabilities - other.probabilities).max() < 1e-3 for one, other in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Forms of images, and invalid images
# ---------------------------------------------------------------------------------------------------------------------


def test_predictions_do_not_depend_on_the_form_of_the_image(predictor, folder):
    path = folder / "rgb.png"
    image = Image.open(path)
    array = np.array(image)
    forms = {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "file": io.BytesIO(path.read_bytes()),
        "PIL": image,
        "not yet decoded": Image.open(path),
        "array": array,
        "channels first": np.moveaxis(array, 2, 0),
        "reversed strides": array[::-1][::-1],
        "alpha": np.dstack([array, np.full_like(array[..., 0], 255)]),
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
        "float": array / 255.0,
        "half": torch.from_numpy(array).to(torch.float16) / 255,
        "function": lambda: path,
    }
    expected = predictor(path).probabilities
    for name, prediction in zip(forms, predictor(list(forms.values())), strict=True):
        assert isinstance(prediction, Prediction), (name, prediction)
        np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-6, err_msg=name)
    with path.open("rb") as file:
        np.testing.assert_allclose(predictor(file).probabilities, expected, atol=1e-6)


def test_predictor_accepts_grey_arrays(predictor, folder):
    array = np.array(Image.open(folder / "grey.png"))
    expected = predictor(folder / "grey.png").probabilities
    for form in (array, array[None], array[..., None]):
        np.testing.assert_allclose(predictor(form).probabilities, expected, atol=1e-6)


def test_one_lazy_image_may_be_passed_many_times(predictor, folder):
    for _ in range(5):
        image = Image.open(folder / "sideways.jpg")
        scores = {round(prediction.score, 5) for prediction in predictor([image] * 16)}
        assert scores == {round(predictor(folder / "sideways.jpg").score, 5)}


BAD = [
    ("nothing.png", "nothing.png: no such file"),
    (b"no image", "images[1]: expected an image, found a file in none of these formats"),
    (7, "images[2]: expected a path, bytes, a file, a PIL image, an array or a tensor, got int"),
    (np.zeros((5, 6, 7), np.uint8), "images[3]: expected [height, width], or with 1, 3 or 4 channels at one end"),
    (np.zeros((3, 9, 3), np.uint8), "images[4]: expected [height, width], or with"),
    (np.zeros((0, 4), np.uint8), "images[5]: expected [height, width]"),
    (np.zeros((2, 3, 8, 8), np.uint8), "images[6]: expected [height, width]"),
    (np.full((8, 8), 1.5), "images[7]: expected floating pixels between 0 and 1, got 1.5 to 1.5"),
    (np.full((8, 8), np.nan), "images[8]: expected floating pixels between 0 and 1"),
    (torch.zeros(3, 8, 8, dtype=torch.int64), "images[9]: expected uint8, uint16 or floating pixels, got int64"),
    (io.StringIO("text"), "images[10]: expected a file opened for reading bytes, read str"),
    (lambda: 1 / 0, "images[11]: cannot be read (ZeroDivisionError"),
]


def test_invalid_images_become_errors_in_the_results(predictor, files):
    bad = [image for image, _ in BAD]
    results = predictor([*bad, files[0]])
    for result, (_, message) in zip(results, BAD, strict=False):
        assert isinstance(result, InputError) and str(result).startswith(message), result
    assert results[-1].label == predictor(files[0]).label
    assert all(isinstance(result, InputError) for result in predictor(bad))


def test_invalid_images_raise_with_raise_errors_or_alone(predictor, files):
    with pytest.raises(InputError, match=r"nothing\.png: no such file"):
        predictor([files[0], "nothing.png"], raise_errors=True)
    with pytest.raises(InputError, match="image: expected an image"):
        predictor(b"no image")
    assert isinstance(predictor("nothing.png", raise_errors=False), InputError)
    assert isinstance(predictor(files[0]), Prediction)


def test_damaged_files_do_not_affect_other_images(predictor, folder, files):
    random = np.random.default_rng(0)
    damaged = []
    for path in files * 6:
        content = bytearray(Path(path).read_bytes())
        for position in random.integers(0, len(content), 8):
            content[position] = random.integers(0, 256)
        damaged.append(bytes(content[: random.integers(1, len(content))]) if random.random() < 0.5 else bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
        results = predictor([*damaged, files[0]])
    assert {type(result) for result in results[:-1]} <= {Prediction, InputError}
    assert any(isinstance(result, InputError) for result in results)
    assert results[-1].score == pytest.approx(predictor(files[0]).score, abs=1e-6)


def test_image_that_would_be_resized_to_too_many_pixels_raises(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    preprocessor = Preprocessor.from_processor(PROCESSORS["Bit"]())
    with pytest.raises(InputError, match="thin: 1x900 pixels would be resized to 41x36900"):
        preprocessor(Image.new("RGB", (1, 900)), "thin")


def test_stream_reads_images_a_few_batches_ahead(predictor, files):
    taken = 0

    def images():
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield files[0]

    stream = predictor.stream(images())
    assert next(stream).label == predictor(files[0]).label
    assert 4 <= taken <= 16
    assert len(list(stream)) == 99 and taken == 100


# ---------------------------------------------------------------------------------------------------------------------
# Invalid models and arguments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch: expected at least 1, got 0"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"max_wait_ms": -1}, "max_wait_ms: expected 0 or more, got -1"),
        ({"device": "nowhere"}, "device: cannot use 'nowhere'"),
        ({"dtype": "int8"}, "dtype: expected a floating torch.dtype, such as 'bfloat16', got 'int8'"),
        ({"dtype": "no"}, "dtype: expected a floating torch.dtype"),
        ({"image_processor": ViTImageProcessorPil()}, "images of (32, 32) (height, width) for this model"),
    ],
)
def test_invalid_arguments_raise_and_start_no_threads(options, message, folder):
    before = list_threads()
    with pytest.raises(InputError) as caught:
        Predictor(folder, **options)
    assert message in str(caught.value) and list_threads() == before


def test_unsupported_models_raise(tmp_path, files):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    fastvit.ViTForImageClassification(vit_config()).save_pretrained(tmp_path / "alone")
    with pytest.raises(InputError, match=r"expected an image processor \(preprocessor_config.json\)"):
        Predictor(tmp_path / "alone")
    with pytest.raises(InputError, match="image_processor: expected one"):
        Predictor(fastvit.ViTForImageClassification(vit_config()))
    with pytest.raises(InputError, match="model: expected a classifier of fastvit or transformers, got Linear"):
        Predictor(nn.Linear(2, 2))
    with pytest.raises(InputError, match="image_mean: expected 1 finite number"):
        Predictor(fastvit.ViTForImageClassification(vit_config(num_channels=1)), image_processor=processor)
    with pytest.raises(InputError, match="no folder"):
        Predictor(tmp_path / "nothing")
    backbone = fastvit.ViTModel(vit_config())
    with (
        Predictor(backbone, image_processor=processor) as predictor,
        pytest.raises(InputError, match="has logits, got ViTModel"),
    ):
        predictor(files[0])


def test_passed_model_is_not_copied_and_keeps_its_config(folder):
    model = fastvit.ViTForImageClassification.from_pretrained(folder).train()
    with Predictor(model) as predictor:
        assert predictor.model is model and not model.training
        assert not hasattr(model.config, "image_mean")
    with Predictor(folder) as predictor:  # a model loaded by the predictor normalises with the processor's statistics
        assert predictor.model.config.image_mean == pytest.approx(ODD["image_mean"])
        assert predictor.model.config.image_std == pytest.approx(ODD["image_std"])


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


def test_concurrent_calls_get_their_own_results(folder, files):
    with Predictor(folder, "cpu", max_batch=4, max_wait_ms=1) as predictor:
        expected = {path: predictor(path).probabilities for path in files}
        failures = []

        def client(seed):
            random = np.random.default_rng(seed)
            for _ in range(6):
                paths = [files[index] for index in random.integers(0, len(files), random.integers(1, 7))]
                for path, result in zip(paths, predictor(paths), strict=True):
                    if np.abs(result.probabilities - expected[path]).max() > 1e-5:
                        failures.append(path)
                if not isinstance(predictor("nothing.png", raise_errors=False), InputError):
                    failures.append("no error")

        with ThreadPoolExecutor(8) as clients:
            list(clients.map(client, range(8)))
    assert not failures


def test_close_ends_all_threads_and_calls(folder, files):
    gc.collect()
    before = set(list_threads())
    predictor = Predictor(folder, "cpu")
    predictor(files)
    assert set(list_threads()) > before
    stream = predictor.stream(files * 20)
    next(stream)
    predictor.close()
    assert set(list_threads()) <= before
    predictor.close()
    for call in (lambda: predictor(files[0]), lambda: predictor(files), lambda: list(stream)):
        with pytest.raises(RuntimeError, match="the predictor is closed"):
            call()


def test_garbage_collected_predictor_ends_its_threads(folder, files):
    gc.collect()
    before = set(list_threads())
    predictor = Predictor(folder, "cpu")
    predictor(files)
    gone = weakref.ref(predictor.model)
    del predictor
    gc.collect()
    deadline = time.monotonic() + 10
    while not set(list_threads()) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="requires os.fork")
def test_predictor_raises_in_a_forked_process(predictor, files):
    predictor(files)
    image = Image.new("RGB", (3, 3))
    with warnings.catch_warnings(), images._read_lock:  # as if another thread were decoding
        warnings.simplefilter("ignore")  # Python warns about a fork with threads
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # kill the child if it hangs
    if child == 0:
        code = 1
        try:
            to_image(image)
            for call in (lambda: predictor(files[0]), lambda: predictor(files)):
                try:
                    call()
                except RuntimeError as error:
                    code = 0 if "create it after the fork" in str(error) else 2
            predictor.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(predictor(files)) == len(files)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_predict_command_continues_after_an_invalid_image(folder, capsys):
    good = str(folder / "rgb.png")
    assert cli.main(["predict", str(folder), good, "nothing.png", good, "--device", "cpu", "--top", "2"]) == 2
    captured = capsys.readouterr()
    assert "error: nothing.png: no such file" in captured.err.splitlines()
    lines = captured.out.splitlines()
    assert lines[0] == lines[3] == good and lines[1:3] == lines[4:] and "class " in lines[1]
    assert cli.main(["predict", str(folder), good, "--batch-size", "0"]) == 2
    assert "--batch-size: expected at least 1, got 0" in capsys.readouterr().err


BEANS = os.environ.get("FASTVIT_BEANS_DIR")


@pytest.mark.skipif(
    not BEANS or not Path(BEANS).is_dir(), reason="FASTVIT_BEANS_DIR is not set to the folder of the beans photographs"
)
def test_predictions_of_photographs_equal_the_transformers_pipeline(predictor, pipe):
    photographs = [str(path) for path in sorted(Path(BEANS, "validation").rglob("*.jpg"))[::7]]
    assert_same(predictor(photographs), pipe(photographs))
    assert_same(predictor([to_image(path) for path in photographs]), pipe(photographs))
