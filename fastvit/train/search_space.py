"""The options that `fastvit sweep` can vary, and their ranges."""

from __future__ import annotations

import dataclasses

from fastvit.errors import InputError
from fastvit.train.arguments import check_value
from fastvit.train.options import FinetuneOptions

# Option -> lowest, highest, and whether proposals are log-uniform.
SPACE = {
    "learning_rate": (1e-5, 1e-2, True),
    "weight_decay": (1e-4, 0.3, True),
    "layer_decay": (0.5, 1.0, False),
    "label_smoothing": (0.0, 0.2, False),
    "warmup": (0.0, 0.3, False),
    "drop_path": (0.0, 0.3, False),
    "hidden_dropout": (0.0, 0.3, False),
    "attention_dropout": (0.0, 0.3, False),
    "mixup": (0.0, 1.0, False),
    "cutmix": (0.0, 1.0, False),
}
DEFAULT_SEARCH = ("learning-rate", "weight-decay", "layer-decay")

Range = tuple[float, float, bool]


def parse_range(text: str) -> tuple[str, Range]:
    """Parse 'weight-decay' or 'weight-decay=0.01:0.1' into the option's name and its range.

    Raises:
        InputError: an unknown option, or limits that it does not accept.
    """
    name, _, limits = text.partition("=")
    name = name.replace("-", "_")
    if name not in SPACE:
        raise InputError(f"--search: expected one of {', '.join(SPACE).replace('_', '-')}, got {text!r}")
    if not limits:
        return name, SPACE[name]
    try:
        low, high = (float(limit) for limit in limits.split(":"))
    except ValueError:
        raise InputError(f"--search: expected {text.partition('=')[0]}=LOW:HIGH, two numbers, got {text!r}") from None
    logarithmic = SPACE[name][2]
    if not low <= high or (logarithmic and low <= 0):
        raise InputError(f"--search: expected LOW:HIGH from low to high{', above 0' * logarithmic}, got {text!r}")
    (field,) = (field for field in dataclasses.fields(FinetuneOptions) if field.name == name)
    for limit in (low, high):
        check_value(field, limit)
    return name, (low, high, logarithmic)
