"""Runs a classifier on its device: uint8 images in, class probabilities out.

On a GPU images are copied from pinned memory on a separate stream, which overlaps with computation. Batches are padded
to powers of two, and each size is captured as a CUDA graph after a few calls. A graph needs one launch instead of one
per kernel; launches dominate the latency of small batches.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvit.errors import InputError, is_out_of_memory
from fastvit.models.backbone import accepts_uint8
from fastvit.models.calibration import compute_probabilities
from fastvit.models.pretrained import ViTPreTrainedModel
from fastvit.ops import eager
from fastvit.serve.engines import EngineModel
from fastvit.serve.preprocessing import Preprocessor

Outputs = tuple[Tensor, Tensor]  # probabilities [B, classes], indices of the best [B, top_k]
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


class Classifier(nn.Module):
    """A model and its normalisation: uint8 `[B, H, W, channels]` -> logits, float32 `[B, classes]`.

    Args:
        model: a classifier, in its final dtype and on its device.
        preprocessor: its mean and standard deviation are applied to the pixels.
    """

    def __init__(self, model: nn.Module, preprocessor: Preprocessor):
        super().__init__()
        self.model = model
        config: Any = model.config
        # Our models normalise in their patch embedding. Other models, or another mean, need a separate normalisation.
        self.accepts_uint8 = isinstance(model, EngineModel) or (
            (isinstance(model, ViTPreTrainedModel) or accepts_uint8(model))
            and all(
                np.allclose(ours, theirs)
                for ours, theirs in (
                    (getattr(config, "image_mean", None) or [0.5] * preprocessor.channels, preprocessor.mean),
                    (getattr(config, "image_std", None) or [0.5] * preprocessor.channels, preprocessor.std),
                )
            )
        )
        first = next(model.parameters(), torch.empty(0))
        self.dtype = first.dtype
        mean, std = (
            torch.tensor(values, device=first.device).view(-1, 1, 1) for values in (preprocessor.mean, preprocessor.std)
        )
        self.scale, self.offset = 1 / (255 * std), -mean / std

    def forward(self, pixel_values: Tensor) -> Tensor:
        if not self.accepts_uint8:
            pixel_values = (pixel_values.permute(0, 3, 1, 2) * self.scale + self.offset).to(self.dtype)
        output = self.model(pixel_values)
        if not hasattr(output, "logits"):
            raise InputError(f"model: expected a classifier whose output has logits, got {type(self.model).__name__}")
        return output.logits.float()


class Runner:
    """Runs the model of a predictor. Not thread-safe.

    Args:
        model: a classifier on `device`, or an engine in its place.
        preprocessor: its mean and standard deviation are applied to the pixels.
        device: the model's device.
        max_batch: maximum batch size. It is halved whenever memory runs out.
        top_k: number of class indices to return, best first.
        flip: average the logits of each image and its mirror image.
        capture: captures a function as a CUDA graph; None: no graphs.
        activation: maps logits and the config to probabilities.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessor: Preprocessor,
        *,
        device: torch.device,
        max_batch: int,
        top_k: int,
        flip: bool = False,
        capture: Capture | None = None,
        activation: Callable[[Tensor, Any], Tensor] = compute_probabilities,
    ):
        self.classifier, self.config, self.device = Classifier(model, preprocessor), model.config, device
        self.top_k, self.limit, self.flip, self.activation = top_k, max_batch, flip, activation
        self.graphs = None if capture is None else GraphCache(self.forward, max_batch, capture)
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device computes asynchronously."""
        return self.device.type == "cuda"

    def forward(self, pixels: Tensor) -> Outputs:
        """Compute probabilities and the best classes: uint8 [B, H, W, 3] -> float32 [B, classes], int64 [B, top_k]."""
        logits = self.classifier(pixels)
        if self.flip:
            logits = (logits + self.classifier(pixels.flip(2))) / 2
        probabilities = self.activation(logits, self.config)
        return probabilities, probabilities.topk(self.top_k).indices

    def launch(self, images: Sequence[np.ndarray]) -> Callable[[], list[tuple[np.ndarray, np.ndarray]]]:
        """Start to compute a batch. If memory runs out, the batch size is halved permanently, with a warning.

        Args:
            images: uint8 arrays `[H, W, 3]` of one size.

        Returns:
            A function that waits for the results: (probabilities float32 `[classes]`, best classes int64 `[top_k]`)
            for each image.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for a single image. Other types for other allocators, see
                `fastvit.errors.is_out_of_memory`.
        """
        pieces: list[Callable[[], list[tuple[np.ndarray, np.ndarray]]]] = []
        start = 0
        while start < len(images):
            piece = images[start : start + self.limit]
            try:
                pieces.append(self._launch(piece))
                start += len(piece)
                continue
            except Exception as error:
                eager.disable_onednn_after(error)
                if len(piece) == 1 or not is_out_of_memory(error):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            # Outside of the handler, where the traceback would keep the activations alive.
            self.limit = len(piece) // 2
            warnings.warn(f"out of memory: the batch size is limited to {self.limit} ({reason})", stacklevel=1)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a graph that will be freed may be running
            if self.graphs is not None:
                self.graphs.drop_above(self.limit)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return lambda: [result for finish in pieces for result in finish()]

    @torch.inference_mode()
    def _launch(self, images: Sequence[np.ndarray]) -> Callable[[], list[tuple[np.ndarray, np.ndarray]]]:
        on_gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext():
            on_host = torch.empty(len(images), *images[0].shape, dtype=torch.uint8, pin_memory=on_gpu)
            np.stack(images, out=on_host.numpy())
            outputs = (self.graphs or self.forward)(self._to_device(on_host))
            # Non-blocking copies go to pinned memory. They are in stream order, so before the next replay.
            results = [output.to("cpu", non_blocking=True) for output in outputs]
            done = torch.cuda.Event() if on_gpu else None
            if done is not None:
                done.record()

        def finish() -> list[tuple[np.ndarray, np.ndarray]]:
            if done is not None:
                done.synchronize()
            # Copied, so that results do not keep pinned memory alive.
            return list(zip(*(result.numpy().copy() for result in results), strict=True))

        return finish

    def _to_device(self, pixels: Tensor) -> Tensor:
        if self.copy_stream is None:
            return pixels.to(self.device)
        with torch.cuda.stream(self.copy_stream):
            pixels = pixels.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream()
        computing.wait_stream(self.copy_stream)
        pixels.record_stream(computing)
        return pixels


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------

WARM_UP_CALLS = 2  # calls per size before its capture: libraries allocate, kernels compile and are tuned


@dataclass
class Bucket:
    """The graph of one batch size.

    Attributes:
        pixels: the graph's input, uint8 `[size, H, W, 3]`.
        calls: calls of this size so far.
        replay: runs the graph; None before the capture.
        outputs: the graph's outputs; None before the capture.
    """

    pixels: Tensor
    calls: int = 0
    replay: Callable[[], None] | None = None
    outputs: Outputs | None = None


class GraphCache:
    """Captures `forward` as one CUDA graph per batch size. Sizes are padded to powers of two, or to `max_batch`.

    If a capture fails, a warning is issued and `forward` is called without graphs from then on.

    Args:
        forward: maps uint8 `[B, H, W, 3]` to outputs.
        max_batch: maximum batch size.
        capture: records a call of a function; returns a function that replays it and the outputs that each replay
            overwrites.
    """

    def __init__(self, forward: Callable[[Tensor], Outputs], max_batch: int, capture: Capture):
        self.forward, self.max_batch = forward, max_batch
        self.capture: Capture | None = capture
        self.buckets: dict[int, Bucket] = {}

    def __call__(self, pixels: Tensor) -> Outputs:
        """Compute the outputs of uint8 [B, H, W, 3]. The next call of the same size overwrites them."""
        if self.capture is None:
            return self.forward(pixels)
        count = len(pixels)
        size = min(1 << (count - 1).bit_length(), self.max_batch)
        if size not in self.buckets:
            self.buckets[size] = Bucket(pixels.new_zeros(size, *pixels.shape[1:]))
        bucket = self.buckets[size]
        bucket.pixels[:count].copy_(pixels)
        bucket.pixels[count:].zero_()
        bucket.calls += 1
        if bucket.replay is None and bucket.calls > WARM_UP_CALLS:
            try:
                bucket.replay, bucket.outputs = self.capture(partial(self.forward, bucket.pixels))
            except RuntimeError as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"CUDA graphs are off: a batch of {size} cannot be captured ({reason})", stacklevel=1)
                self.capture = None
                self.buckets.clear()
                return self.forward(pixels)
        if bucket.replay is not None and bucket.outputs is not None:
            bucket.replay()
            outputs = bucket.outputs
        else:
            outputs = self.forward(bucket.pixels)
        return outputs[0][:count], outputs[1][:count]

    def drop_above(self, size: int) -> None:
        """Free the graphs of batches larger than `size`."""
        self.max_batch = size
        self.buckets = {each: bucket for each, bucket in self.buckets.items() if each <= size}


def capture_graphs() -> Capture:
    """Create a function that captures CUDA graphs into one memory pool.

    Sharing a pool is safe: graphs never run concurrently, and outputs are copied before the next replay.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU during the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs

    return capture
