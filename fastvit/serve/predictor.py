"""Thread-safe image classification:  Predictor("runs/leaves")("leaf.jpg").label

    image -> decode, resize, crop              Preprocessor: in a thread pool, or in the caller's thread
          -> batches over all callers          Batcher
          -> normalise, model, probabilities   Runner: in the one thread that owns the model
          -> Prediction                        in the caller's thread

An image that cannot be used does not affect other images of its batch.
"""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from fastvit.adapters import backbones
from fastvit.checkpoints.configuration import make_pair
from fastvit.checkpoints.locations import find_exported
from fastvit.data.images import to_image
from fastvit.errors import InputError
from fastvit.models.backbone import FAMILIES, accepts_uint8, get_vision_config
from fastvit.models.calibration import compute_probabilities, get_thresholds
from fastvit.models.pretrained import ViTPreTrainedModel
from fastvit.report.tasks import get_task
from fastvit.serve.batching import CLOSED, Batcher
from fastvit.serve.engines import (
    choose_runtime,
    convert_model,
    count_cpus,
    get_default_device,
    load_exported,
    warn_of_oversubscription,
)
from fastvit.serve.preprocessing import Preprocessor, load_preprocessor
from fastvit.serve.runner import Classifier, Runner, capture_graphs
from fastvit.tuning.startup import tune_at_start

logger = logging.getLogger("fastvit")

Prepared = np.ndarray | InputError  # uint8 pixels [H, W, 3], or the error of an image that cannot be used

PREFETCH_BATCHES = 2  # batches of one call that are decoded, and that are computed, ahead of the one being returned


@dataclass(frozen=True, eq=False)
class Prediction:
    """The classification of one image, or the numbers that a regression predicts for it.

    Attributes:
        label: name of the most probable class; of a regression, of the first number.
        score: probability of that class; of a regression, the first number.
        top: (label, score) of the `top_k` most probable classes, best first; of a regression, all numbers.
        probabilities: float32 `[classes]`, in the order of `Predictor.class_names`. They sum to 1, except for
            multi-label models; of a regression, the numbers.
        selected: (label, score) of what the model predicts: the most probable class; the labels of a multi-label model
            that reach their thresholds, best first; all numbers of a regression.
    """

    label: str
    score: float
    top: tuple[tuple[str, float], ...]
    probabilities: np.ndarray
    selected: tuple[tuple[str, float], ...] = ()


class Predictor:
    """A thread-safe image classifier. As a context manager it is closed at the end of the block.

    Args:
        model: a folder or hub id of a classifier of any family that `fastvit.optimize` knows, a file that `fastvit
            export` has written, or a loaded classifier of fastvit or transformers, optionally after
            `fastvit.optimize`. A loaded model is set to eval mode and moved to `device` and `dtype` if given.
        device: device of the model. Default: a GPU if available; a loaded model stays on its device.
        dtype: dtype of the weights, a floating `torch.dtype` or its name. Default: unchanged.
        max_batch: maximum batch size. A batch may combine several calls.
        image_processor: an image processor of transformers. Default: the one saved with the model.
        top_k: number of classes in `Prediction.top`.
        flip: average the logits of each image and its mirror image.
        max_wait_ms: time in milliseconds that a batch with room waits for calls that are decoding. Without concurrent
            calls it never waits.
        workers: number of decoding threads. Default: the number of CPUs that the process may use.
        cuda_graphs: on a GPU, capture each batch size as a CUDA graph.
        tune: on a GPU without measurements for this model, first measure whether our kernels or PyTorch's operations
            are faster, for batches of 1 and `max_batch`. Takes at most a minute.
        runtime: "torch", "openvino" or "onnxruntime", which computes in the dtype of the weights. "auto": OpenVINO for
            a model that is loaded here on a CPU, where it is installed; otherwise torch, and for a loaded model.
        fast_jpeg: decode large JPEG files at 1/2, 1/4 or 1/8 of their size, but at least three times the model's. The
            resized pixels differ a little: on photographs by 1.4 grey levels on average, 99 % of them by less than 9.

    Attributes:
        model: the loaded model.
        preprocessor: its image preprocessing.
        class_names: names of the classes, by index.
        task: what the model predicts (`fastvit.report.tasks`).
        thresholds: probability from which each label of a multi-label model is predicted, float `[classes]`.

    Raises:
        InputError: the model, the image processor or another argument cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_batch: int = 32,
        *,
        image_processor: Any = None,
        top_k: int = 5,
        flip: bool = False,
        max_wait_ms: float = 0.0,
        workers: int | None = None,
        cuda_graphs: bool = True,
        tune: bool = True,
        runtime: str = "auto",
        fast_jpeg: bool = False,
    ):
        for name, number in (("max_batch", max_batch), ("top_k", top_k), ("workers", workers)):
            if number is not None and number < 1:
                raise InputError(f"{name}: expected at least 1, got {number}")
        if not max_wait_ms >= 0:
            raise InputError(f"max_wait_ms: expected 0 or more, got {max_wait_ms}")
        dtype = resolve_dtype(dtype)
        exported = find_exported(model)
        is_shared = isinstance(model, nn.Module)
        if device is not None or not is_shared:
            device = resolve_device(device or get_default_device(exported))
        place: Any = device
        self.model: Any
        if exported is None:
            self.model, self.preprocessor = load_classifier(model, image_processor)
        elif image_processor is not None:
            raise InputError(f"image_processor: expected None for {exported}, which normalises in its graph")
        else:
            self.model, self.preprocessor = load_exported(exported, runtime, place, dtype)
        check_compatibility(self.model, self.preprocessor)
        config: Any = self.model.config
        self.class_names = get_class_names(config)
        self.task, self.thresholds = get_task(config), get_thresholds(config)
        computing = self.model
        if exported is None:
            self.model.eval()
            if device is not None or dtype is not None:
                self.model.to(device=device, dtype=dtype)
            place = next(self.model.parameters()).device
            sizes = [(size, False) for size in sorted({1, max_batch})[::-1]]
            if tune and (line := tune_at_start(self.model, sizes)):
                logger.info("%s (tune=False skips this)", line)
            computing = prepare_model(self.model, self.preprocessor, runtime, is_shared)
        runner = Runner(
            computing,
            self.preprocessor,
            device=place,
            max_batch=max_batch,
            top_k=min(top_k, len(self.class_names)),
            flip=flip,
            capture=capture_graphs() if cuda_graphs and exported is None and place.type == "cuda" else None,
            activation=self._activation,
        )
        self._preprocess = partial(
            preprocess, self.preprocessor, min_side=self.preprocessor.draft_side if fast_jpeg else None
        )
        self._batcher = Batcher(
            runner.launch, max_batch=max_batch, max_wait=max_wait_ms / 1e3, launch_ahead=runner.is_asynchronous
        )
        self._pool = ThreadPoolExecutor(workers or count_cpus(), thread_name_prefix="fastvit-decoding")
        # Also called at garbage collection and at the end of the program.
        self._shut_down = weakref.finalize(self, shut_down, self._batcher, self._pool)

    _activation = staticmethod(compute_probabilities)

    def __call__(self, images: Any, *, raise_errors: bool | None = None) -> Any:
        """Classify one image, or a list or tuple of images.

        Args:
            images: an image, or a list or tuple of images. An image is a path, the bytes of a file, a binary file
                object, a PIL image, an array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]` (uint8, or floating from 0
                to 1), or a function that returns one of these and is called in a decoding thread.
            raise_errors: raise the InputError of an image that cannot be used. Otherwise the error is returned in place
                of the image's Prediction. Default: true for a single image, false for several.

        Returns:
            A Prediction for a single image, a list of them for several.

        Raises:
            InputError: an image cannot be used, if `raise_errors`. The message names the image.
            RuntimeError: the predictor is closed, or was created in another process. Exceptions of the model are raised
                unchanged.
        """
        if isinstance(images, (list, tuple)):
            return list(self.stream(images, raise_errors=bool(raise_errors)))
        # A single image is decoded in the calling thread, which saves a switch of threads.
        pending = self._compute([partial(self._preprocess, images, "image")])
        (result,) = self._collect_results(*pending, raise_errors=raise_errors is not False)
        return result

    def stream(self, images: Iterable[Any], *, raise_errors: bool = False) -> Iterator[Prediction | InputError]:
        """Classify images lazily. The iterable is read a few batches ahead of the results.

        Args:
            images: any number of images, as for calls.
            raise_errors: raise the InputError of an image that cannot be used instead of yielding it.

        Yields:
            A Prediction or InputError per image, in order.

        Raises:
            InputError, RuntimeError: as for calls.
        """
        decoding: deque[list[Callable[[], Prepared]]] = deque()
        computing: deque[tuple[list[Prepared], Future[list[Any]]]] = deque()
        numbered = enumerate(images)
        while chunk := list(itertools.islice(numbered, self._batcher.max_batch)):
            decoding.append(self._decode(chunk))
            if len(decoding) == PREFETCH_BATCHES:
                computing.append(self._compute(decoding.popleft()))
            if len(computing) == PREFETCH_BATCHES:
                yield from self._collect_results(*computing.popleft(), raise_errors)
        while decoding:
            computing.append(self._compute(decoding.popleft()))
        while computing:
            yield from self._collect_results(*computing.popleft(), raise_errors)

    def close(self) -> None:
        """Finish the launched batch and end all threads. Waiting and later calls raise RuntimeError. Idempotent."""
        self._shut_down()
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self, chunk: list[tuple[int, Any]]) -> list[Callable[[], Prepared]]:
        """Start to decode numbered images in the pool. Each function waits for one image."""
        self._batcher.check_open()
        return [self._pool.submit(self._preprocess, image, f"images[{n}]").result for n, image in chunk]

    def _compute(self, decoded: list[Callable[[], Prepared]]) -> tuple[list[Prepared], Future[list[Any]]]:
        """Wait for decoded images and queue them for the model. The images are returned too, for their errors."""
        self._batcher.announce()
        try:
            prepared = [each() for each in decoded]
        except CancelledError:
            self._batcher.withdraw()
            raise RuntimeError(CLOSED) from None
        except BaseException:
            self._batcher.withdraw()
            raise
        return prepared, self._batcher.submit([each for each in prepared if not isinstance(each, InputError)])

    def _collect_results(
        self, prepared: list[Prepared], results: Future[list[Any]], raise_errors: bool
    ) -> Iterator[Prediction | InputError]:
        """Wait for the model; yield predictions and errors in the order of the images."""
        computed = iter(results.result())
        for each in prepared:
            if not isinstance(each, InputError):
                yield self._build_prediction(*next(computed))
            elif raise_errors:
                raise each
            else:
                yield each

    def _build_prediction(self, probabilities: np.ndarray, best: np.ndarray) -> Prediction:
        chosen = self.task.select(probabilities, self.thresholds)
        selected, top = (
            tuple((self.class_names[index], float(probabilities[index])) for index in indices)
            for indices in (chosen, chosen if self.task.kind == "regression" else best)
        )
        return Prediction(*top[0], top, probabilities, selected)


def preprocess(preprocessor: Preprocessor, source: Any, name: str, min_side: int | None = None) -> Prepared:
    """Decode and preprocess an image.

    Args:
        preprocessor: resizes and crops.
        source: any form of image that `Predictor` accepts.
        name: names the image in error messages if it has no path.
        min_side: a JPEG may be decoded at a reduced size with sides of at least this length.

    Returns:
        uint8 `[H, W, 3]`, or the error of an image that cannot be used.
    """
    name = str(source) if isinstance(source, (str, Path)) else name
    try:
        return preprocessor(to_image(source, name, preprocessor.channels, min_side), name)
    except InputError as error:
        return error.with_traceback(None)  # its frames would keep the image alive
    except Exception as error:  # of a user's function, or of Pillow, which raises many types for damaged files
        return InputError(f"{name}: cannot be read ({type(error).__name__}: {error})")


def shut_down(batcher: Batcher, pool: ThreadPoolExecutor) -> None:
    batcher.close()
    pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Resolution of the arguments
# ---------------------------------------------------------------------------------------------------------------------


def load_classifier(model: str | os.PathLike[str] | nn.Module, image_processor: Any) -> tuple[nn.Module, Preprocessor]:
    """Load the classifier and its preprocessor."""
    if isinstance(model, nn.Module):
        if not hasattr(getattr(model, "config", None), "id2label"):
            raise InputError(f"model: expected a classifier of fastvit or transformers, got {type(model).__name__}")
        channels = getattr(model.config, "num_channels", 3)
        return model, resolve_preprocessor(getattr(model, "name_or_path", ""), image_processor, channels)
    classifier = backbones.load_classifier(os.fspath(model))
    channels = getattr(classifier.config, "num_channels", 3)
    preprocessor = resolve_preprocessor(os.fspath(model), image_processor, channels)
    # Not shared with the caller, so the model can normalise with the statistics of its image processor.
    classifier.config.image_mean, classifier.config.image_std = list(preprocessor.mean), list(preprocessor.std)
    return classifier, preprocessor


def prepare_model(model: Any, preprocessor: Preprocessor, runtime: str, is_shared: bool) -> nn.Module:
    """The module that computes a loaded model: itself, or an engine.

    Args:
        model: in its final dtype and on its device.
        preprocessor: of the model.
        runtime: one of `RUNTIMES`. If auto cannot convert the model, a warning says why, and PyTorch computes it.
        is_shared: whether the caller holds the model, and may change it.
    """
    first = next(model.parameters())
    chosen = choose_runtime(runtime, first.device, first.dtype, is_shared)
    if chosen == "torch":
        if first.device.type == "cpu":
            warn_of_oversubscription()
        return model
    try:
        engine = convert_model(Classifier(model, preprocessor), model.config, preprocessor.image_shape, chosen)
    except Exception as error:  # of tracers and engines, which have no common class
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if runtime != "auto":
            raise InputError(f"runtime: {chosen} cannot compute this model ({reason})") from error
        logger.warning("PyTorch computes the model, because it cannot be converted for %s (%s)", chosen, reason)
        return model
    logger.info("%s computes the model in %s (runtime='torch': PyTorch)", chosen, first.dtype)
    return engine


def resolve_preprocessor(model: Any, image_processor: Any, channels: int = 3) -> Preprocessor:
    """Convert `image_processor`, or by default the one saved with the model (a folder or hub id)."""
    if isinstance(image_processor, Preprocessor):
        return image_processor
    if image_processor is not None:
        return Preprocessor.from_processor(image_processor, channels=channels)
    if not model:
        raise InputError("image_processor: expected one, as the model is neither a folder nor a hub id")
    return load_preprocessor(model, channels)


def check_compatibility(model: nn.Module, preprocessor: Preprocessor) -> None:
    """Raise InputError if preprocessed images do not fit the model, or the model is not a classifier."""
    config: Any = model.config
    vision = get_vision_config(config)
    is_loaded = accepts_uint8(model)  # by us, from a folder or the hub
    if isinstance(model, ViTPreTrainedModel) or (is_loaded and FAMILIES[vision.model_type].has_fixed_size):
        image_size = make_pair(vision.image_size)
        if image_size != preprocessor.image_size:
            raise InputError(
                f"image processor: expected images of {image_size} (height, width) for this model,"
                f" got {preprocessor.image_size}"
            )


def get_class_names(config: Any) -> list[str]:
    names = config.id2label
    if sorted(names) != list(range(config.num_labels)):
        raise InputError(f"model: config.id2label: expected names for 0 to {config.num_labels - 1}")
    return [str(names[index]) for index in range(config.num_labels)]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Resolve the device; default: a GPU if available. Raises InputError if the device cannot be used."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: cannot use {str(device)!r} ({str(error).splitlines()[0]})") from None
    return found


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"dtype: expected a floating torch.dtype, such as 'bfloat16', got {dtype!r}")
    return found
