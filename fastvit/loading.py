"""Load a pretrained classifier, with errors that a person can act on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import ViTConfig

from fastvit.errors import InputError
from fastvit.modeling import ViTForImageClassification

T = TypeVar("T")


def load_config(model: str) -> ViTConfig:
    """The config of a hub id or folder, with errors that a person can act on."""
    return _reach(model, lambda: ViTConfig.from_pretrained(model))


def load_pretrained(model: str, **kwargs: Any) -> ViTForImageClassification:
    """A pretrained classifier from a hub id or folder; only its head may differ from what `kwargs` asks for."""

    def load() -> ViTForImageClassification:
        loaded, info = ViTForImageClassification.from_pretrained(model, output_loading_info=True, **kwargs)
        for key, found, expected in sorted(info["mismatched_keys"]):  # a set: name the same one each time
            if not key.startswith("classifier."):
                raise InputError(f"{model}: {key}: expected shape {list(expected)}, found {list(found)}")
        return loaded

    return _reach(model, load)


def _reach(model: str, load: Callable[[], T]) -> T:
    """Run `load`, turning what transformers raises for a missing or broken checkpoint into one clear line."""
    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise InputError(f"model: expected a hub id (owner/name) or a folder, found no folder {model!r}")
    try:
        return load()
    except InputError:
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(model).is_dir():
            raise InputError(f"{model}: cannot be loaded as a ViT checkpoint ({first_line})") from error
        raise InputError(
            f"model: cannot get {model!r} from the hub ({first_line}); without a network use --model FOLDER"
            " (a checkpoint on this machine) or --from-scratch SIZE"
        ) from error
