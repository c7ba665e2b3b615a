"""How fast are image files classified, beside transformers' pipeline, with the same weights and image processor?

A call with a list of files is timed: decoding, resizing, the model, names and scores of all classes. The files are the
beans photographs if FASTVIT_BEANS_DIR names their folder, otherwise drawn leaves of the same size.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping
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
from fastvit.data import leaves

ANSWER = "files to classes"
IMAGE_SIZE = 256  # height and width of the files


class Case(NamedTuple):
    folder: tempfile.TemporaryDirectory  # model and image processor
    files: list[str]
    dtype: torch.dtype
    device: torch.device
    answers: dict[Callable[..., Any], Callable[[], list[dict[str, float]]]]  # by provider
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


class Serving(Operation):
    passes = (ANSWER,)
    hides_launch = False
    counts_images = True
    baseline = "transformers"
    seconds = 3.0
    targets: Mapping[str, Mapping[str, float]] = {ANSWER: {"speed_up": 1.0}}

    def __init__(self) -> None:
        super().__init__("predictor")

    def list_shapes(self, device: torch.device, quick: bool) -> list[Shape]:
        if quick:
            return [Shape("micro", 64, 2)]
        large = "base" if device.type == "cuda" else "small"
        return [Shape(size, 224, batch, int(size == "micro")) for size in (large, "micro") for batch in (32, 1)]

    def compute_costs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        return {ANSWER: Cost(count_forward_flops(shape), 0)}

    def get_error_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        return 1e-4 if dtype == torch.float32 else 2e-2, super().get_error_bounds(dtype)[1]

    def make_case(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        folder = tempfile.TemporaryDirectory()
        save_model(shape, folder.name)
        case = Case(folder, list_image_files(shape.batch, Path(folder.name)), dtype, device, {}, {})
        exact = case._replace(dtype=torch.float32, answers={})
        case.expected.update(self.compute_results(self.prepare(self.providers["transformers"], exact), exact))
        return case

    def prepare(self, provider: Provider, case: Any) -> dict[str, Step]:
        if provider.function not in case.answers:
            case.answers[provider.function] = provider.function(case)
        answer = case.answers[provider.function]
        return {ANSWER: Step(lambda _: answer())}

    def compute_results(self, steps: dict[str, Step], case: Any) -> dict[str, Tensor]:
        answers: Any = steps[ANSWER].run(None)
        scores = torch.zeros(len(answers), NUM_CLASSES)
        for row, answer in zip(scores, answers, strict=True):
            for label, score in answer.items():
                row[int(label.removeprefix("LABEL_"))] = score
        return {"scores": scores}

    def measure_saved_bytes(self, steps: Mapping[str, Step], case: Any) -> None:
        return None


predictor = Serving()


@predictor.provider("fastvit", kernel="layer_norm")
def load_fastvit(case: Case) -> Callable[[], list[dict[str, float]]]:
    served = fastvit.Predictor(case.folder.name, case.device, case.dtype, max_batch=len(case.files), top_k=NUM_CLASSES)
    return lambda: [dict(prediction.top) for prediction in served(case.files)]


@predictor.provider("transformers")
def load_transformers(case: Case) -> Callable[[], list[dict[str, float]]]:
    # Pillow, as ours: torchvision, its default where installed, resizes to other pixels.
    processor = ViTImageProcessorPil.from_pretrained(case.folder.name)
    where = {"device": case.device, "dtype": case.dtype}
    pipe = transformers.pipeline("image-classification", case.folder.name, image_processor=processor, **where)

    def answer() -> list[dict[str, float]]:
        answers = pipe(case.files, batch_size=len(case.files), top_k=NUM_CLASSES)
        return [{each["label"]: each["score"] for each in best} for best in answers]

    return answer


OPERATIONS = (predictor,)
