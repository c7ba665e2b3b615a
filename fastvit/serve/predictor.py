"""Classify pictures from many threads at once:  Predictor("runs/leaves")("leaf.jpg").label

    picture -> decode, resize, crop              Preprocessor: in a pool of threads, or the caller's
            -> batches of what all callers ask   Batcher
            -> normalise, model, probabilities   Runner: in the one thread that owns the model
            -> Prediction                        in the caller's thread

A picture that cannot be used is an error of that picture alone.
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

from fastvit.checkpoints.configuration import make_pair
from fastvit.data.images import to_image
from fastvit.errors import InputError
from fastvit.models.loading import load_pretrained
from fastvit.models.pretrained import ViTPreTrainedModel
from fastvit.serve.batching import CLOSED, Batcher
from fastvit.serve.preprocessing import Preprocessor, load_preprocessor
from fastvit.serve.runner import Runner, capture_graphs
from fastvit.tuning.startup import tune_at_start

logger = logging.getLogger("fastvit")

Prepared = np.ndarray | InputError  # uint8 pixels [H, W, 3], or what is wrong with the picture

PREFETCH_BATCHES = 2  # batches of one call that are decoded or computed while the one before is waited for


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says about a picture.

    label, score: the most probable class. top: the `top_k` most probable as (label, score), best first.
    probabilities: float32 [classes], in the order of `Predictor.class_names`; they sum to 1, unless a picture may have
    several labels.
    """

    label: str
    score: float
    top: tuple[tuple[str, float], ...]
    probabilities: np.ndarray


class Predictor:
    """A classifier to be asked by many threads; a context manager, which closes it.

    model: a folder or hub id of a ViT, or a loaded classifier: ours or one of transformers', as it is or after
        `fastvit.optimize`. A loaded one is put into eval mode, and onto `device` and into `dtype` if they are given.
    device: where to compute [a GPU if there is one; of a loaded model: where it is].
    dtype: of the weights, a torch.dtype or its name [as saved].
    max_batch: how many pictures are computed at once, of one call or of several.
    image_processor: a transformers image processor [the one in the model's folder].
    top_k: how many classes `Prediction.top` has.
    flip: take the mean of the logits for each picture and for its mirror image.
    max_wait_ms: how long a batch with room waits for other calls that are just decoding; a lone call never waits.
    workers: threads that decode [as many as there are cores].
    cuda_graphs: on a GPU, replay each batch size as a CUDA graph.
    tune: on a GPU, measure first which operations our kernels compute faster than PyTorch, where that has not been
        measured there before: a minute at most, for batches of 1 and `max_batch`.

    Raises InputError for a model, image processor or argument that it cannot use.
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
    ):
        for name, number in (("max_batch", max_batch), ("top_k", top_k), ("workers", workers)):
            if number is not None and number < 1:
                raise InputError(f"{name}: expected at least 1, got {number}")
        if not max_wait_ms >= 0:
            raise InputError(f"max_wait_ms: expected 0 or more, got {max_wait_ms}")
        dtype = resolve_dtype(dtype)
        if device is not None or not isinstance(model, nn.Module):
            device = resolve_device(device)
        classifier, self.preprocessor = load_classifier(model, image_processor)
        check_compatibility(classifier, self.preprocessor)
        classifier.eval()
        if device is not None or dtype is not None:
            classifier.to(device=device, dtype=dtype)
        self.model: Any = classifier
        config: Any = self.model.config
        self.class_names = get_class_names(config)
        first = next(self.model.parameters())
        if tune and (line := tune_at_start(self.model, [(size, False) for size in sorted({1, max_batch})[::-1]])):
            logger.info("%s (tune=False leaves this out)", line)
        runner = Runner(
            self.model,
            self.preprocessor,
            device=first.device,
            dtype=first.dtype,
            max_batch=max_batch,
            top_k=min(top_k, config.num_labels),
            flip=flip,
            capture=capture_graphs() if cuda_graphs and first.device.type == "cuda" else None,
        )
        self._batcher = Batcher(
            runner.launch, max_batch=max_batch, max_wait=max_wait_ms / 1e3, launch_ahead=runner.is_asynchronous
        )
        self._pool = ThreadPoolExecutor(workers or os.cpu_count(), thread_name_prefix="fastvit-decoding")
        # Also when it is forgotten, and when the program ends.
        self._shut_down = weakref.finalize(self, shut_down, self._batcher, self._pool)

    def __call__(self, images: Any, *, raise_errors: bool | None = None) -> Any:
        """The Prediction of a picture, or a list of those of a list.

        A picture is a path, the bytes of a file or an open one, a PIL image, a uint8 array or tensor ([H, W], [H, W, C]
        or [C, H, W]; floating between 0 and 1), or a function that returns one of these.

        raise_errors: whether a picture that cannot be used raises its InputError, which names it; otherwise the error
        takes the place of its Prediction, and the others are not affected [a lone picture raises, one of a list not].
        What the model raises is raised in any case.
        """
        if isinstance(images, (list, tuple)):
            return list(self.stream(images, raise_errors=bool(raise_errors)))
        # Decoded here: a lone picture need not go to another thread and back.
        pending = self._compute([partial(preprocess, self.preprocessor, images, "image")])
        (result,) = self._collect_results(*pending, raise_errors=raise_errors is not False)
        return result

    def stream(self, images: Iterable[Any], *, raise_errors: bool = False) -> Iterator[Prediction | InputError]:
        """The same for any number of pictures, in their order; they are taken a few batches ahead of what is given."""
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
        """Finish the batch that is being computed and end all threads; calls that wait get RuntimeError.

        May be called again. A call to a predictor that is closed is a RuntimeError.
        """
        self._shut_down()
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self, chunk: list[tuple[int, Any]]) -> list[Callable[[], Prepared]]:
        """Begin to decode numbered pictures in the pool; each function waits for one."""
        self._batcher.check_open()
        return [self._pool.submit(preprocess, self.preprocessor, image, f"images[{n}]").result for n, image in chunk]

    def _compute(self, decoded: list[Callable[[], Prepared]]) -> tuple[list[Prepared], Future[list[Any]]]:
        """Queue pictures for the model as soon as all are decoded; returns them too, for the errors among them."""
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
        """Wait for the model; predictions and errors in the order of the pictures."""
        computed = iter(results.result())
        for each in prepared:
            if not isinstance(each, InputError):
                yield self._build_prediction(*next(computed))
            elif raise_errors:
                raise each
            else:
                yield each

    def _build_prediction(self, probabilities: np.ndarray, best: np.ndarray) -> Prediction:
        top = tuple((self.class_names[index], float(probabilities[index])) for index in best)
        return Prediction(*top[0], top, probabilities)


def preprocess(preprocessor: Preprocessor, source: Any, name: str) -> Prepared:
    """The pixels of a picture, or what is wrong with it; `name` is what it is called if it has no path."""
    name = str(source) if isinstance(source, (str, Path)) else name
    try:
        return preprocessor(to_image(source, name), name)
    except InputError as error:
        return error.with_traceback(None)  # whose frames hold the picture
    except Exception as error:  # of Pillow, for which there is no end of ways to be broken, or of a user's function
        return InputError(f"{name}: cannot be read ({type(error).__name__}: {error})")


def shut_down(batcher: Batcher, pool: ThreadPoolExecutor) -> None:
    batcher.close()
    pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# What a predictor is made from
# ---------------------------------------------------------------------------------------------------------------------


def load_classifier(model: str | os.PathLike[str] | nn.Module, image_processor: Any) -> tuple[nn.Module, Preprocessor]:
    """The classifier, and what its pictures go through before it."""
    if isinstance(model, nn.Module):
        if not hasattr(getattr(model, "config", None), "id2label"):
            raise InputError(f"model: expected a classifier of fastvit or transformers, got {type(model).__name__}")
        return model, resolve_preprocessor(getattr(model, "name_or_path", ""), image_processor)
    classifier = load_pretrained(os.fspath(model))
    preprocessor = resolve_preprocessor(os.fspath(model), image_processor)
    # It is ours alone: let it normalise as its image processor says.
    classifier.config.image_mean, classifier.config.image_std = list(preprocessor.mean), list(preprocessor.std)
    return classifier, preprocessor


def resolve_preprocessor(model: Any, image_processor: Any) -> Preprocessor:
    """What `image_processor` does, or the one that lies with the model, a folder or hub id."""
    if image_processor is not None:
        return Preprocessor.from_processor(image_processor)
    if not model:
        raise InputError("image_processor: expected one, as the model comes neither from a folder nor from the hub")
    return load_preprocessor(model)


def check_compatibility(model: nn.Module, preprocessor: Preprocessor) -> None:
    """Raises InputError where pictures would not fit the model, or its outputs are no classes."""
    config: Any = model.config
    if config.problem_type == "regression":
        raise InputError("model: config.problem_type: expected a classifier, got 'regression'")
    if getattr(config, "num_channels", 3) != 3:
        raise InputError(f"model: config.num_channels: expected 3, for RGB, got {config.num_channels}")
    if isinstance(model, ViTPreTrainedModel) and make_pair(config.image_size) != preprocessor.image_size:
        raise InputError(
            f"image processor: expected pictures of {make_pair(config.image_size)} (height, width) for this model,"
            f" got {preprocessor.image_size}"
        )


def get_class_names(config: Any) -> list[str]:
    names = config.id2label
    if sorted(names) != list(range(config.num_labels)):
        raise InputError(f"model: config.id2label: expected names for 0 to {config.num_labels - 1}")
    return [str(names[index]) for index in range(config.num_labels)]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or a GPU if there is one; raises InputError if it cannot be used."""
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
