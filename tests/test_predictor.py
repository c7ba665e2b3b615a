"""The predictor: what it answers, in which forms it takes pictures, and what happens when anything goes wrong."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
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
from fastvit.serve.batching import Batcher
from fastvit.serve.preprocessing import Preprocessor, load_preprocessor
from fastvit.serve.runner import WARM_UP_CALLS, GraphCache, Runner, capture_graphs

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
    """Weights large enough that classes differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its image processor, as `fastvit finetune` leaves them, and pictures of many kinds."""
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
    transparent.putalpha(255)  # opaque: what is not is laid on white, while transformers drops it
    transparent.save(root / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
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
    """transformers' own, resizing with Pillow whatever else is installed."""
    return transformers.pipeline("image-classification", model, image_processor=processor, device="cpu")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(str(folder), ViTImageProcessorPil.from_pretrained(folder))


def fastvit_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastvit-")]


def assert_same(predictions, answers, tolerance=1e-5):
    """Predictions hold what transformers' pipeline says."""
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
# What it answers
# ---------------------------------------------------------------------------------------------------------------------


def test_files_get_what_the_transformers_pipeline_says(predictor, pipe, files):
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
    "crop larger than the picture": lambda: transformers.BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 33, "width": 32}
    ),
    "crop alone": lambda: transformers.DeiTImageProcessorPil(do_resize=False, crop_size={"height": 40, "width": 40}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_those_of_the_image_processor(kind):
    processor = PROCESSORS[kind]()
    preprocessor = Preprocessor.from_processor(processor)
    for width, height in ((48, 48), (31, 77), (150, 20), (1, 5)):
        image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels = preprocessor(image)
        assert pixels.dtype == np.uint8 and pixels.shape[:2] == preprocessor.image_size
        theirs = processor(images=image, return_tensors="np").pixel_values[0]
        mean, std = (np.array(values)[:, None, None] for values in (preprocessor.mean, preprocessor.std))
        np.testing.assert_allclose((np.moveaxis(pixels, 2, 0) / 255 - mean) / std, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["no normalisation", "another factor", "no factor"])
def test_unusual_normalisation_reaches_the_model(kind, folder, files):
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
def test_image_processors_that_do_something_else_are_refused(settings, message):
    processor = ViTImageProcessorPil().to_dict() | settings
    with pytest.raises(InputError, match="image processor") as caught:
        Preprocessor.from_processor(SimpleNamespace(to_dict=lambda: processor))
    assert message in str(caught.value)


def test_image_processor_is_read_from_its_file(tmp_path):
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


def test_scores_of_several_labels_are_independent(folder, files):
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
def test_loaded_models_of_transformers(kind, folder, files, pipe):
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


def test_dtype_is_that_of_the_weights(folder, files, predictor):
    with Predictor(folder, "cpu", "bfloat16") as half:
        assert half.model.dtype == torch.bfloat16
        for one, other in zip(half(files), predictor(files), strict=True):
            assert np.abs(one.probabilities - other.probabilities).max() < 0.05
            assert one.probabilities.dtype == np.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_gpu_gives_the_same_answers(graphs, folder, files, predictor):
    with Predictor(folder, "cuda", max_batch=4, cuda_graphs=graphs) as on_gpu:
        for _ in range(WARM_UP_CALLS + 2):
            for count in (1, 3, len(files)):
                pairs = zip(on_gpu(files[:count]), predictor(files[:count]), strict=True)
                assert all(np.abs(one.probabilities - other.probabilities).max() < 1e-3 for one, other in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures in all forms, and broken ones
# ---------------------------------------------------------------------------------------------------------------------


def test_an_image_is_the_same_in_every_form(predictor, folder):
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


def test_grey_arrays_are_grey_images(predictor, folder):
    array = np.array(Image.open(folder / "grey.png"))
    expected = predictor(folder / "grey.png").probabilities
    for form in (array, array[None], array[..., None]):
        np.testing.assert_allclose(predictor(form).probabilities, expected, atol=1e-6)


def test_one_image_not_yet_decoded_may_be_given_many_times(predictor, folder):
    for _ in range(5):
        image = Image.open(folder / "sideways.jpg")
        scores = {round(prediction.score, 5) for prediction in predictor([image] * 16)}
        assert scores == {round(predictor(folder / "sideways.jpg").score, 5)}


BAD = [
    ("nothing.png", "nothing.png: no such file"),
    (b"no picture", "images[1]: expected an image, found a file that is none"),
    (7, "images[2]: expected a path, bytes, a file, a PIL image, an array or a tensor, got int"),
    (np.zeros((5, 6, 7), np.uint8), "images[3]: expected [height, width], or with 1, 3 or 4 channels at one end"),
    (np.zeros((3, 9, 3), np.uint8), "images[4]: expected [height, width], or with"),
    (np.zeros((0, 4), np.uint8), "images[5]: expected [height, width]"),
    (np.zeros((2, 3, 8, 8), np.uint8), "images[6]: expected [height, width]"),
    (np.full((8, 8), 1.5), "images[7]: expected floating pixels between 0 and 1, got 1.5 to 1.5"),
    (np.full((8, 8), np.nan), "images[8]: expected floating pixels between 0 and 1"),
    (torch.zeros(3, 8, 8, dtype=torch.int64), "images[9]: expected uint8 or floating pixels, got int64"),
    (io.StringIO("text"), "images[10]: expected a file opened for reading bytes, read str"),
    (lambda: 1 / 0, "images[11]: cannot be read (ZeroDivisionError"),
]


def test_bad_images_are_errors_in_their_places(predictor, files):
    bad = [image for image, _ in BAD]
    results = predictor([*bad, files[0]])
    for result, (_, message) in zip(results, BAD, strict=False):
        assert isinstance(result, InputError) and str(result).startswith(message), result
    assert results[-1].label == predictor(files[0]).label
    assert all(isinstance(result, InputError) for result in predictor(bad))


def test_bad_images_raise_when_asked_or_alone(predictor, files):
    with pytest.raises(InputError, match=r"nothing\.png: no such file"):
        predictor([files[0], "nothing.png"], raise_errors=True)
    with pytest.raises(InputError, match="image: expected an image"):
        predictor(b"no picture")
    assert isinstance(predictor("nothing.png", raise_errors=False), InputError)
    assert isinstance(predictor(files[0]), Prediction)


def test_damaged_files_never_harm_the_others(predictor, folder, files):
    random = np.random.default_rng(0)
    damaged = []
    for path in files * 6:
        content = bytearray(Path(path).read_bytes())
        for position in random.integers(0, len(content), 8):
            content[position] = random.integers(0, 256)
        damaged.append(bytes(content[: random.integers(1, len(content))]) if random.random() < 0.5 else bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it finds in them
        results = predictor([*damaged, files[0]])
    assert {type(result) for result in results[:-1]} <= {Prediction, InputError}
    assert any(isinstance(result, InputError) for result in results)
    assert results[-1].score == pytest.approx(predictor(files[0]).score, abs=1e-6)


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    preprocessor = Preprocessor.from_processor(PROCESSORS["Bit"]())
    with pytest.raises(InputError, match="thin: 1x900 pixels would be resized to 41x36900"):
        preprocessor(Image.new("RGB", (1, 900)), "thin")


def test_stream_takes_images_a_few_batches_ahead(predictor, files):
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
# Models and arguments that do not work
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
        ({"image_processor": ViTImageProcessorPil()}, "pictures of (32, 32) (height, width) for this model"),
    ],
)
def test_wrong_arguments_name_themselves(options, message, folder):
    before = fastvit_threads()
    with pytest.raises(InputError) as caught:
        Predictor(folder, **options)
    assert message in str(caught.value) and fastvit_threads() == before


def test_wrong_models_are_refused(tmp_path, files):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    fastvit.ViTForImageClassification(vit_config()).save_pretrained(tmp_path / "alone")
    with pytest.raises(InputError, match=r"expected an image processor \(preprocessor_config.json\)"):
        Predictor(tmp_path / "alone")
    with pytest.raises(InputError, match="image_processor: expected one"):
        Predictor(fastvit.ViTForImageClassification(vit_config()))
    with pytest.raises(InputError, match="model: expected a classifier of fastvit or transformers, got Linear"):
        Predictor(nn.Linear(2, 2))
    with pytest.raises(InputError, match="num_channels: expected 3, for RGB, got 1"):
        Predictor(fastvit.ViTForImageClassification(vit_config(num_channels=1)), image_processor=processor)
    with pytest.raises(InputError, match="expected a classifier, got 'regression'"):
        regression = fastvit.ViTForImageClassification(vit_config(problem_type="regression"))
        Predictor(regression, image_processor=processor)
    with pytest.raises(InputError, match="no folder"):
        Predictor(tmp_path / "nothing")
    backbone = fastvit.ViTModel(vit_config())
    with (
        Predictor(backbone, image_processor=processor) as predictor,
        pytest.raises(InputError, match="has logits, got ViTModel"),
    ):
        predictor(files[0])


def test_given_model_keeps_its_place_and_its_own_normalisation(folder):
    model = fastvit.ViTForImageClassification.from_pretrained(folder).train()
    with Predictor(model) as predictor:
        assert predictor.model is model and not model.training
        assert not hasattr(model.config, "image_mean")
    with Predictor(folder) as predictor:  # one that was loaded here normalises by itself
        assert predictor.model.config.image_mean == pytest.approx(ODD["image_mean"])
        assert predictor.model.config.image_std == pytest.approx(ODD["image_std"])


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


class Model:
    """Squares numbers, batch by batch, as slowly as it is told; the stand-in for a runner's `launch`."""

    def __init__(self):
        self.batches, self.finished, self.gate = [], [], threading.Event()
        self.gate.set()

    def __call__(self, inputs):
        self.batches.append(inputs)
        assert self.gate.wait(10)
        if "boom" in inputs:
            raise ValueError("boom")
        if "bang" in inputs:
            raise SystemExit("bang")

        def finish():
            self.finished.append(inputs)
            if "late" in inputs:
                raise ValueError("late")
            return [each * each for each in inputs]

        return finish

    def wait_for(self, batches):
        deadline = time.monotonic() + 10
        while len(self.batches) < batches:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def square():
    model = Model()
    yield model
    model.gate.set()


def ask(batcher, *inputs):
    batcher.announce()
    return batcher.submit(list(inputs))


def test_calls_that_wait_become_one_batch_and_stay_together(square):
    batcher = Batcher(square, max_batch=4)
    square.gate.clear()
    first = ask(batcher, 1)
    square.wait_for(1)
    futures = [ask(batcher, *inputs) for inputs in ((2, 3), (4,), (5, 6), (7,), ())]
    square.gate.set()
    assert first.result(10) == [1]
    assert [future.result(10) for future in futures] == [[4, 9], [16], [25, 36], [49], []]
    assert square.batches == [[1], [2, 3, 4], [5, 6, 7]]
    batcher.close()


def test_a_lone_call_does_not_wait_and_an_announced_one_is_waited_for(square):
    batcher = Batcher(square, max_batch=4, max_wait=5.0)
    begun = time.monotonic()
    assert ask(batcher, 2).result(10) == [4]
    assert time.monotonic() - begun < 4
    batcher.announce()  # somebody decodes
    first = ask(batcher, 3)
    time.sleep(0.05)
    assert square.batches == [[2]]
    second = batcher.submit([4])
    assert (first.result(10), second.result(10)) == ([9], [16])
    assert square.batches == [[2], [3, 4]]
    batcher.announce()
    third = ask(batcher, 5)
    batcher.withdraw()  # its picture was broken
    assert third.result(4) == [25]
    batcher.announce()
    assert ask(batcher, 1, 2, 3, 4).result(4) == [1, 4, 9, 16]  # a full batch waits for nobody
    batcher.withdraw()
    batcher.close()


def test_a_batch_waits_no_longer_than_max_wait(square):
    batcher = Batcher(square, max_batch=4, max_wait=0.05)
    batcher.announce()
    assert ask(batcher, 3).result(10) == [9]
    batcher.close()


def test_next_batch_is_launched_before_the_last_one_is_waited_for(square):
    batcher = Batcher(square, max_batch=1, launch_ahead=True)
    square.gate.clear()
    futures = [ask(batcher, number) for number in (1, 2, 3)]
    square.wait_for(1)
    log = []
    finish = square.finished
    square.finished = SimpleNamespace(
        append=lambda inputs: log.append((inputs, len(square.batches))) or finish.append(1)
    )
    square.gate.set()
    assert [future.result(10) for future in futures] == [[1], [4], [9]]
    assert log == [([1], 2), ([2], 3), ([3], 3)]  # (finished, batches launched by then)
    batcher.close()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("bad", "error"), [("boom", ValueError), ("late", ValueError), ("bang", SystemExit)])
def test_errors_of_the_model_go_to_their_callers_and_the_thread_survives(bad, error, ahead, square):
    batcher = Batcher(square, max_batch=2, launch_ahead=ahead)
    with pytest.raises(error, match=bad):
        ask(batcher, bad).result(10)
    assert ask(batcher, 3).result(10) == [9]
    batcher.close()


def test_close_finishes_the_batch_and_fails_what_waits(square):
    batcher = Batcher(square, max_batch=1)
    square.gate.clear()
    computing = ask(batcher, 2)
    square.wait_for(1)
    waiting = ask(batcher, 3)
    batcher.announce()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(RuntimeError, match="the predictor is closed"):
        waiting.result(10)
    with pytest.raises(RuntimeError, match="the predictor is closed"):
        batcher.submit([4])
    square.gate.set()
    closing.join(10)
    assert computing.result(10) == [4] and not closing.is_alive()
    batcher.close()
    with pytest.raises(RuntimeError, match="the predictor is closed"):
        batcher.announce()


def test_many_threads_get_their_own_answers(folder, files):
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


def test_closing_ends_all_threads_and_calls(folder, files):
    gc.collect()
    before = set(fastvit_threads())
    predictor = Predictor(folder, "cpu")
    predictor(files)
    assert set(fastvit_threads()) > before
    stream = predictor.stream(files * 20)
    next(stream)
    predictor.close()
    assert set(fastvit_threads()) <= before
    predictor.close()
    for call in (lambda: predictor(files[0]), lambda: predictor(files), lambda: list(stream)):
        with pytest.raises(RuntimeError, match="the predictor is closed"):
            call()


def test_forgotten_predictor_ends_its_threads(folder, files):
    gc.collect()
    before = set(fastvit_threads())
    predictor = Predictor(folder, "cpu")
    predictor(files)
    gone = weakref.ref(predictor.model)
    del predictor
    gc.collect()
    deadline = time.monotonic() + 10
    while not set(fastvit_threads()) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert gone() is None


def test_program_that_closes_nothing_ends():
    program = (
        "import threading, time\n"
        "from fastvit.serve.batching import Batcher\n"
        "batcher = Batcher(lambda inputs: time.sleep(600), max_batch=1)\n"
        "batcher.announce()\n"
        "threading.Thread(target=batcher.submit([1]).result, daemon=True).start()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fastvit.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_is_told_that_the_predictor_is_not_its_own(predictor, files):
    predictor(files)
    image = Image.new("RGB", (3, 3))
    with warnings.catch_warnings(), images._read_lock:  # somebody decodes
        warnings.simplefilter("ignore")  # of Python, of threads beside a fork
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # whoever hangs dies
    if child == 0:
        code = 1
        try:
            to_image(image)
            for call in (lambda: predictor(files[0]), lambda: predictor(files)):
                try:
                    call()
                except RuntimeError as error:
                    code = 0 if "make it after the fork" in str(error) else 2
            predictor.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(predictor(files)) == len(files)


# ---------------------------------------------------------------------------------------------------------------------
# The runner: memory, CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


class Sums(nn.Module):
    """Logits are a picture's sums of channels; no room for more than `room` pictures."""

    def __init__(self, room=1000, error=torch.OutOfMemoryError, text="CUDA out of memory. Tried 1 TiB\nand more"):
        super().__init__()
        self.config = SimpleNamespace(num_labels=3, problem_type=None)
        self.room, self.error, self.text, self.sizes = room, error, text, []

    def forward(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise self.error(self.text)
        return SimpleNamespace(logits=pixels.sum((2, 3)))


PLAIN = Preprocessor((2, 2), None, 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def runner_of(model, **options):
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    return Runner(model, PLAIN, **cpu, **{"max_batch": 8, "top_k": 2, **options})


def make_images(count):
    return list(np.random.default_rng(count).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8))


def assert_sums(results, images):
    assert len(results) == len(images)
    for (probabilities, best), image in zip(results, images, strict=True):
        expected = torch.from_numpy(image / 255).sum((0, 1)).softmax(0).numpy()
        np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
        assert list(best) == list(np.argsort(-expected)[:2])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, lambda text: MemoryError()])
def test_out_of_memory_halves_the_batch_and_goes_on(error):
    model = Sums(room=2, error=error)
    runner = runner_of(model)
    with pytest.warns(UserWarning, match="out of memory: batches of at most") as caught:
        assert_sums(runner.launch(make_images(7))(), make_images(7))
    assert [str(one.message)[:41] for one in caught] == [
        "out of memory: batches of at most 3 from ",
        "out of memory: batches of at most 1 from ",
    ]
    assert model.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_sums(runner.launch(make_images(2))(), make_images(2))


def test_out_of_memory_for_one_image_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        runner_of(Sums(room=0)).launch(make_images(1))
    with pytest.raises(ValueError, match="out of memory"):  # of memory only what PyTorch says
        runner_of(Sums(room=1, error=ValueError)).launch(make_images(4))


def test_onednn_is_turned_off_once_it_lacked_memory():
    runner = runner_of(Sums(room=2, error=RuntimeError, text="could not create a primitive"))
    with torch.backends.mkldnn.flags(enabled=True):
        with pytest.warns(UserWarning) as caught:
            assert_sums(runner.launch(make_images(7))(), make_images(7))
        assert not torch.backends.mkldnn.enabled
    assert [str(one.message).partition(":")[0] for one in caught] == [
        "oneDNN is off from now on",
        "out of memory",
        "out of memory",
    ]
    runner = runner_of(Sums(room=0, error=RuntimeError, text="could not create a primitive"))
    with torch.backends.mkldnn.flags(enabled=True):
        with pytest.warns(UserWarning, match="oneDNN is off"), pytest.raises(RuntimeError, match="create a primitive"):
            runner.launch(make_images(1))  # fails, but need not fail again
        assert not torch.backends.mkldnn.enabled


class Recorder:
    """Captures as CUDA graphs do: the function runs once, on the inputs it will read again; a replay writes the same
    outputs."""

    def __init__(self):
        self.captured, self.replays = 0, 0

    def __call__(self, function):
        self.captured += 1
        outputs = function()

        def replay():
            self.replays += 1
            for output, new in zip(outputs, function(), strict=True):
                output.copy_(new)

        for output in outputs:
            output.fill_(0)  # a capture computes nothing
        return replay, outputs


def test_batch_sizes_are_padded_to_powers_of_two_and_captured_once_seen():
    model, recorder = Sums(), Recorder()
    runner = runner_of(model, max_batch=6, capture=recorder)
    for call in range(WARM_UP_CALLS + 3):
        for count in (1, 2, 3, 4, 5, 6):
            images = make_images(count + 10 * call)[:count]
            assert_sums(runner.launch(images)(), images)
    assert sorted(runner.graphs.buckets) == [1, 2, 4, 6] == sorted(set(model.sizes))
    assert recorder.captured == 4
    calls = {1: WARM_UP_CALLS + 3, 2: WARM_UP_CALLS + 3, 4: 2 * (WARM_UP_CALLS + 3), 6: 2 * (WARM_UP_CALLS + 3)}
    assert recorder.replays == sum(calls.values()) - 4 * WARM_UP_CALLS


def test_padding_is_black_whatever_was_there_before():
    seen = []

    def forward(pixels):
        seen.append(pixels.clone())
        return pixels, pixels

    graphs = GraphCache(forward, 4, Recorder())
    graphs(torch.full((4, 2, 2, 3), 9, dtype=torch.uint8))
    outputs = graphs(torch.full((3, 2, 2, 3), 7, dtype=torch.uint8))
    assert seen[1][:3].eq(7).all() and seen[1][3].eq(0).all() and len(outputs[0]) == len(outputs[1]) == 3


def test_failed_capture_is_a_warning_and_no_graphs_from_then_on():
    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nat ...")

    model = Sums()
    runner = runner_of(model, capture=fails)
    with pytest.warns(
        UserWarning, match="CUDA graphs are off: a batch of 4 cannot be captured .operation not permitted"
    ):
        for _ in range(WARM_UP_CALLS + 2):
            assert_sums(runner.launch(make_images(3))(), make_images(3))
    assert model.sizes == [4] * WARM_UP_CALLS + [3, 3] and not runner.graphs.buckets


def test_graphs_of_large_batches_are_given_up_when_memory_runs_out():
    model, recorder = Sums(), Recorder()
    runner = runner_of(model, capture=recorder)
    for _ in range(WARM_UP_CALLS + 1):
        runner.launch(make_images(8))
        runner.launch(make_images(2))
    model.room = 4
    with pytest.warns(UserWarning, match="at most 4"):
        assert_sums(runner.launch(make_images(8))(), make_images(8))
    assert sorted(runner.graphs.buckets) == [2, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_cuda_graph_repeats_what_it_captured():
    pixels = torch.ones(4, device="cuda")
    pixels.mul(2)
    replay, (doubled, tripled) = capture_graphs()(lambda: (pixels.mul(2), pixels.mul(3)))
    pixels.fill_(5)
    replay()
    assert doubled.eq(10).all() and tripled.eq(15).all()


# ---------------------------------------------------------------------------------------------------------------------
# The commands on top of it
# ---------------------------------------------------------------------------------------------------------------------


def test_predict_goes_on_after_a_bad_image(folder, capsys):
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
    not BEANS or not Path(BEANS).is_dir(), reason="FASTVIT_BEANS_DIR does not name the folder of beans photographs"
)
def test_photographs_get_what_the_transformers_pipeline_says(predictor, pipe):
    photographs = [str(path) for path in sorted(Path(BEANS, "validation").rglob("*.jpg"))[::7]]
    assert_same(predictor(photographs), pipe(photographs))
    assert_same(predictor([to_image(path) for path in photographs]), pipe(photographs))
