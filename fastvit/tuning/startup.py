"""Tuning at the start of `fastvit finetune` and `Predictor`: measure on a GPU the operations that have no record."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from fastvit.ops import records
from fastvit.ops.records import Record
from fastvit.tuning.tuner import tune

logger = logging.getLogger("fastvit")

TIME_LIMIT = 60.0  # seconds


def tune_at_start(
    model: nn.Module,
    workloads: Sequence[tuple[int, bool]],
    dtype: torch.dtype | None = None,
    *,
    is_distributed: bool = False,
) -> str | None:
    """Measure the operations without a record, within `TIME_LIMIT`. Does nothing on a CPU; failures are only logged.

    Args:
        model: on the GPU to be measured.
        workloads: (batch size, training), the most important first.
        dtype: of autocast.
        is_distributed: whether several processes train one model. All of them must call this; the first one measures,
            and all use its records.

    Returns:
        A line that summarises the measurement, or None if there was nothing to measure.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    begin = time.monotonic()
    made: list[Record] = []
    is_distributed = is_distributed and dist.is_initialized()
    if not is_distributed or dist.get_rank() == 0:
        try:
            for batch_size, training in workloads:
                remaining = TIME_LIMIT - (time.monotonic() - begin)
                made += tune(
                    model, batch_size=batch_size, training=training, dtype=dtype, time_limit=remaining, keep=True
                )  # fmt: skip
        except Exception as error:  # the program starts anyway
            logger.warning("tuning at the start failed: %s: %s", type(error).__name__, error)
        if made:  # release the memory, and exclude it from the peak of the following work
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    if is_distributed:
        broadcast_records(records.get_gpu_name(device.type, device.index))
    if not made:
        return None
    ours = sum(isinstance(record.choice, int) for record in made)
    return (
        f"measured {len(made)} operations on this GPU in {time.monotonic() - begin:.0f} s, at most {TIME_LIMIT:.0f}:"
        f" our kernels are faster in {ours}; saved for the next start in {records.get_cache_path()}"
    )


def broadcast_records(gpu: str) -> None:
    """Synchronise the processes, and make all use the first one's records for this GPU."""
    box = [list(records.get_table().get(gpu, {}).values())]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    records.adopt(box[0])
