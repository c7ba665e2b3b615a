"""Tuning: measure whether our kernel or PyTorch's own operation is faster, and with which tile.

    fastvit.ops.cases      the key under which a call's measurements are recorded
    fastvit.ops.records    the records: storage and validity
    trials                 one call, repeated with any candidate
    tuner                  `tune`: collect a model's calls, compile, check each candidate, time them in turn
    compiling              the processes that compile
    startup                tuning at the start of `fastvit finetune` and `Predictor` on a GPU

`fastvit.ops` looks up the records at each operation; only `tune` measures.
"""

from typing import TYPE_CHECKING, Any

from fastvit.ops.records import Record, Timing

if TYPE_CHECKING:
    from fastvit.tuning.tuner import tune

__all__ = ["Record", "Timing", "tune"]


def __getattr__(name: str) -> Any:  # lazy: the tuner imports the operations, which import the records
    if name != "tune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastvit.tuning.tuner import tune

    return tune
