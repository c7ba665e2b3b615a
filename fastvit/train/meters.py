"""Time, speed and memory of training."""

from __future__ import annotations

import sys
import time

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """Measures the time of training over all starts of a run; checkpoints have it."""

    def __init__(self):
        self.earlier, self.start, self.first_step = 0.0, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.perf_counter(), state.global_step

    def read(self) -> float:
        return self.earlier + (0.0 if self.start is None else time.perf_counter() - self.start)

    def state(self) -> dict:
        return {"args": {}, "attributes": {"earlier": self.read()}}


class Meter(TrainerCallback):
    """Measures images per second since the last log, without evaluations and checkpoints, and memory."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.restart(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self.restart(state)

    def on_save(self, args, state, control, **kwargs):
        self.restart(state)

    def restart(self, state) -> None:
        self.start, self.start_step = time.perf_counter(), state.global_step

    def read(self, args, state) -> dict[str, float]:
        used, peak = measure_memory(args.device)
        readings = {"memory_gib": used / 2**30, "peak_memory_gib": peak / 2**30}
        if state.global_step > self.start_step:  # otherwise the meter was just restarted
            images = (state.global_step - self.start_step) * self.images_per_step
            readings["images_per_second"] = images / (time.perf_counter() - self.start)
        self.restart(state)
        return readings


def measure_memory(device: torch.device) -> tuple[int, int]:
    """Current and peak memory in bytes: reserved by PyTorch on a GPU, resident in the process on other devices."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return info.rss, info.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return info.rss, peak * (1 if sys.platform == "darwin" else 1024)  # bytes on macOS, KiB elsewhere
