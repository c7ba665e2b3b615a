"""What `fastvit finetune` and `Predictor` do before they begin: measure on a GPU what was not measured before."""

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

TIME_LIMIT = 60.0  # at most, at a start


def tune_at_start(
    model: nn.Module,
    workloads: Sequence[tuple[int, bool]],
    dtype: torch.dtype | None = None,
    *,
    is_distributed: bool = False,
) -> str | None:
    """Measure what has no record yet, within `TIME_LIMIT`; nothing happens on a CPU, and no failure is an error.

    Args:
        workloads: (batch size, whether to train), the most important first.
        dtype: of autocast.
        is_distributed: of several processes that train one model, all of which must call this, the first one
            measures, and all go by its records.

    Returns:
        A line that says what was done; None where there was nothing to do.
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
        except Exception as error:  # it is no reason not to begin
            logger.warning("tuning at the start failed: %s: %s", type(error).__name__, error)
        if made:  # what follows has the memory to itself, and its peak is its own
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    if is_distributed:
        broadcast_records(records.get_gpu_name(device.type, device.index))
    if not made:
        return None
    ours = sum(isinstance(record.choice, int) for record in made)
    return (
        f"measured {len(made)} operations on this GPU in {time.monotonic() - begin:.0f} s, at most {TIME_LIMIT:.0f}:"
        f" our kernels are faster in {ours}; kept for the next time in {records.get_cache_path()}"
    )


def broadcast_records(gpu: str) -> None:
    """Let all processes go by the records that the first one has for this GPU; they wait for it here."""
    box = [list(records.get_table().get(gpu, {}).values())]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    records.adopt(box[0])
