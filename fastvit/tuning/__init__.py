"""A measured choice: is our kernel faster here, or PyTorch's own operation, and with which tile?

    cases       which measurements hold for a call
    records     what was measured, where it is kept, and what makes it stale
    trials      a call made again by any candidate
    tuner       `tune`: collect a model's calls -> compile side by side -> check each candidate -> time them in turn
    compiling   the processes that compile
    startup     what `fastvit finetune` and `Predictor` do when they begin on a GPU
    command     `fastvit tune`

`fastvit.ops` asks the records at each operation; nothing is timed but by `tune`.
"""

from typing import TYPE_CHECKING, Any

from fastvit.ops.records import Record, Timing

if TYPE_CHECKING:
    from fastvit.tuning.tuner import tune

__all__ = ["Record", "Timing", "tune"]


def __getattr__(name: str) -> Any:  # the tuner imports the operations, which import the records
    if name != "tune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastvit.tuning.tuner import tune

    return tune
