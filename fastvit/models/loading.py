"""Load a pretrained classifier and its image settings, with errors of one line that name the cause."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import ViTConfig
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from fastvit.checkpoints.configuration import format_value, parse_config, read_json
from fastvit.checkpoints.hub import skip_unreachable_hub
from fastvit.checkpoints.images import ImageSettings, parse_image_settings
from fastvit.checkpoints.inspection import read_config
from fastvit.checkpoints.locations import check_location
from fastvit.errors import InputError
from fastvit.models.heads import ViTForImageClassification

T = TypeVar("T")


REMEDY = "without a network, pass a folder with a checkpoint"


def load_config(model: str, remedy: str = REMEDY) -> ViTConfig:
    """Load the config of a hub id or folder.

    Raises:
        InputError: if it is missing or malformed; if the hub cannot be reached, the error ends with `remedy`.
    """
    return explain_load_errors(model, lambda: parse_config(read_config(model), f"{model}: config.json"), remedy)


def read_model_type(model: str, remedy: str = REMEDY) -> Any:
    """Read the model type in the config.json of a hub id or folder; arguments as for `load_config`."""
    return explain_load_errors(model, lambda: read_config(model), remedy).get("model_type")


def load_pretrained(model: str, **kwargs: Any) -> ViTForImageClassification:
    """Load a pretrained classifier.

    Args:
        model: hub id or folder.
        **kwargs: arguments of `ViTForImageClassification.from_pretrained`.

    Raises:
        InputError: if the checkpoint is missing or damaged, or if a tensor outside its head has another shape than
            `kwargs` imply.
    """

    def load() -> ViTForImageClassification:
        with hide_progress_bar():
            loaded, info = ViTForImageClassification.from_pretrained(model, output_loading_info=True, **kwargs)
        for key, found, expected in sorted(info["mismatched_keys"]):  # a set: name the same one each time
            if not key.startswith("classifier."):
                raise InputError(f"{model}: {key}: expected shape {list(expected)}, found {list(found)}")
        return loaded

    return explain_load_errors(model, load)


@contextlib.contextmanager
def hide_progress_bar() -> Iterator[None]:
    """Context without the progress bar of loading weights; those of downloads remain."""
    is_shown, is_hub_silent = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()  # also those of the hub
    if not is_hub_silent:
        enable_progress_bars()
    try:
        yield
    finally:
        if is_shown:
            logging.enable_progress_bar()
        if is_hub_silent:
            disable_progress_bars()


def read_image_settings(model: str) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the preprocessor_config.json of a hub id or folder, or None if it has none."""
    found = explain_load_errors(
        model, lambda: cached_file(model, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False)
    )
    return None if found is None else (Path(found), read_json(Path(found)))


def load_image_settings(model: str, config: ViTConfig) -> ImageSettings | None:
    """Return mean, std, size and filter from the preprocessor_config.json of a hub id or folder; None without one.

    Raises:
        InputError: for settings of the wrong type, and for crops or padding, which are not supported.
    """
    found = read_image_settings(model)
    if found is None:
        return None
    path, settings = found
    for name, expected in (("do_resize", True), ("do_center_crop", False), ("do_pad", False)):
        value = settings.get(name)
        if value is not None and value is not expected:
            raise InputError(f"{path}: {name}: expected {str(expected).lower()}, got {format_value(value)}")
    return parse_image_settings(settings, config, path)


def explain_load_errors(model: str, load: Callable[[], T], remedy: str = REMEDY) -> T:
    """Run `load`; raise the errors of transformers for a missing or broken checkpoint as InputError of one line."""
    check_location(model, has_owner=True)
    try:
        with contextlib.nullcontext() if Path(model).is_dir() else skip_unreachable_hub():
            return load()
    except InputError:
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(model).is_dir():
            raise InputError(f"{model}: cannot be loaded ({first_line})") from error
        raise InputError(
            f"model: found no folder {model!r}, and cannot get it from the hub ({first_line}); {remedy}"
        ) from error
