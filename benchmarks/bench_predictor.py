"""How fast are image files classified, by which runtime, in which dtype, and what does it cost in accuracy?

A call with a list of files is timed: decoding, resizing, the model, names and scores of all classes. Runtimes of
`Predictor` and transformers' pipeline have the same weights and image processor. The files are the beans photographs
if FASTVIT_BEANS_DIR names their folder, otherwise drawn leaves of the same size. FASTVIT_BENCHMARK_MODEL names a model
that was trained on these photographs: it is raced as well, and its accuracy measured in each runtime and dtype.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import ViTImageProcessorPil

import fastvit
from fastvit.benchmarks.bench_model import NUM_CLASSES, count_forward_flops, make_config
from fastvit.benchmarks.cases import Cost, Operation, Provider, Shape
from fastvit.benchmarks.measure import Step
from fastvit.checkpoints.locations import EXPORTED_SUFFIXES
from fastvit.data import leaves
from fastvit.data.images import decode_image
from fastvit.serve.export import export_model

ANSWER = "files to classes"
IMAGE_SIZE = 256  # height and width of the files
TRAINED = "trained"  # variant of the shape of FASTVIT_BENCHMARK_MODEL


class Case(NamedTuple):
    folder: str  # model and image processor
    files: list[str]
    dtype: torch.dtype
    device: torch.device
    answers: dict[Callable[..., Any], Callable[[list[str]], list[dict[str, float]]]]  # by provider
    expected: dict[str, Tensor]


def list_image_files(count: int, folder: Path) -> list[str]:
    """Returns `count` different photographs, in turn from each class, or draws as many leaves."""
    photographs = os.environ.get("FASTVIT_BEANS_DIR")
    if photographs:
        classes = [sorted(path.glob("*.jpg")) for path in sorted(Path(photographs, "validation").iterdir())]
        found = [str(path) for paths in zip(*classes, strict=False) for path in paths]
        return found[:count]
    files = []
    for seed, name in zip(range(count), itertools.cycle(leaves.CLASSES), strict=False):
        files.append(str(folder / f"{seed}.jpg"))
        leaves.draw_leaf(name, seed=seed, size=IMAGE_SIZE).save(files[-1])
    return files


def save_model(shape: Shape, folder: str) -> None:
    """Saves a classifier with random weights and its image processor, as transformers does."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.ViTForImageClassification(make_config(shape)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": shape.image_size, "width": shape.image_size}).save_pretrained(folder)


@cache
def make_folder(size: str, image_size: int) -> tempfile.TemporaryDirectory:
    """Saves a model once for all batch sizes."""
    folder = tempfile.TemporaryDirectory()
    save_model(Shape(size, image_size, 1), folder.name)
    return folder


class Serving(Operation):
    passes = (ANSWER,)
    hides_launch = False
    counts_images = True
    baseline = "transformers"
    seconds = 3.0
    targets: Mapping[str, Mapping[str, float]] = {ANSWER: {"speed_up": 1.0}}

    def __init__(self, name: str, is_quantized: bool = False) -> None:
        super().__init__(name)
        self.is_quantized = is_quantized
        self.accuracies: dict[str, float] = {}  # of the trained model, by provider

    def list_shapes(self, device: torch.device, quick: bool) -> list[Shape]:
        if quick:
            return [Shape("micro", 64, 2)]
        shapes = [
            Shape(size, 224, batch, int(batch != 8)) for size in ("tiny", "small", "base") for batch in (1, 8, 32)
        ]
        # DINOv2-small at 224 pixels with patches of 14 has the tokens of a ViT-S/16 at 256.
        return shapes + ([Shape("small", 256, 8, 0, TRAINED)] if os.environ.get("FASTVIT_BENCHMARK_MODEL") else [])

    def compute_costs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        return {ANSWER: Cost(count_forward_flops(shape), 0)}

    def get_error_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        if self.is_quantized:
            return 0.5, 1.0
        return 1e-4 if dtype == torch.float32 else 2e-2, super().get_error_bounds(dtype)[1]

    def make_case(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        made = make_folder(shape.size, shape.image_size).name
        folder = os.environ["FASTVIT_BENCHMARK_MODEL"] if shape.variant == TRAINED else made
        case = Case(folder, list_image_files(shape.batch, Path(made)), dtype, device, {}, {})
        exact = case._replace(dtype=torch.float32, answers={})
        case.expected.update(self.compute_results(self.prepare(self.providers["transformers"], exact), exact))
        return case

    def prepare(self, provider: Provider, case: Any) -> dict[str, Step]:
        if provider.function not in case.answers:
            case.answers[provider.function] = provider.function(case)
        answer = case.answers[provider.function]
        self.accuracies.pop(provider.name, None)
        if case.folder == os.environ.get("FASTVIT_BENCHMARK_MODEL"):
            files = list_image_files(10**6, Path())
            best = [max(scores, key=scores.__getitem__) for scores in answer(files)]
            right = [name == Path(file).parent.name for name, file in zip(best, files, strict=True)]
            self.accuracies[provider.name] = sum(right) / len(right)
        return {ANSWER: Step(lambda _: answer(case.files))}

    def describe_provider(self, provider: Provider) -> dict[str, float]:
        accuracy = self.accuracies.get(provider.name)
        return {} if accuracy is None else {"accuracy": accuracy}

    def compute_results(self, steps: dict[str, Step], case: Any) -> dict[str, Tensor]:
        answers: Any = steps[ANSWER].run(None)
        names = sorted(answers[0])
        return {"scores": torch.tensor([[answer[name] for name in names] for answer in answers])}

    def measure_saved_bytes(self, steps: Mapping[str, Step], case: Any) -> None:
        return None


predictor, quantized = Serving("predictor"), Serving("predictor_int8", is_quantized=True)
CPU: dict[str, Any] = {"devices": ("cpu",)}


def load_predictor(case: Case, model: str | Path, **options: Any) -> Callable[[list[str]], list[dict[str, float]]]:
    served = fastvit.Predictor(model, case.device, max_batch=len(case.files), top_k=NUM_CLASSES, **options)
    return lambda files: [dict(prediction.top) for prediction in served(files)]


@predictor.provider("fastvit", kernel="layer_norm")
def load_torch(case: Case) -> Any:
    return load_predictor(case, case.folder, dtype=case.dtype, runtime="torch")


@predictor.provider("fastvit OpenVINO", needs=("openvino",), **CPU)
def load_openvino(case: Case) -> Any:
    return load_predictor(case, case.folder, dtype=case.dtype, runtime="openvino")


@predictor.provider("fastvit ONNX Runtime", needs=("onnxruntime", "onnxscript"), **CPU)
def load_onnxruntime(case: Case) -> Any:
    return load_predictor(case, case.folder, dtype=case.dtype, runtime="onnxruntime")


@predictor.provider("transformers")
@quantized.provider("transformers")
def load_transformers(case: Case) -> Any:
    # Pillow, as ours: torchvision, its default where installed, resizes to other pixels.
    processor = ViTImageProcessorPil.from_pretrained(case.folder)
    where = {"device": case.device, "dtype": case.dtype}
    pipe = transformers.pipeline("image-classification", case.folder, image_processor=processor, **where)

    def answer(files: list[str]) -> list[dict[str, float]]:
        answers = pipe(files, batch_size=len(case.files), top_k=NUM_CLASSES)
        return [{each["label"]: each["score"] for each in best} for best in answers]

    return answer


@cache
def quantize(folder: str, suffix: str) -> Path:
    """Exports a model in 8 bits, calibrated on the files."""
    target = Path(tempfile.mkdtemp(), f"model{suffix}")
    images = [decode_image(file) for file in list_image_files(32, target.parent)]
    export_model(folder, target, EXPORTED_SUFFIXES[suffix], "int8", calibrate=lambda resize: list(map(resize, images)))
    return target


@quantized.provider("fastvit OpenVINO int8", needs=("openvino", "onnxruntime", "onnxscript"), **CPU)
def load_openvino_int8(case: Case) -> Any:
    return load_predictor(case, quantize(case.folder, ".xml"), dtype=case.dtype)


@quantized.provider("fastvit ONNX Runtime int8", needs=("onnxruntime", "onnxscript"), **CPU)
def load_onnxruntime_int8(case: Case) -> Any:
    return load_predictor(case, quantize(case.folder, ".onnx"), runtime="onnxruntime")


OPERATIONS = (predictor, quantized)
