"""The hub where it cannot be reached: caches are used at once, or an error is raised."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants, get_session

SETTINGS = ("huggingface_hub.constants", "datasets.config")  # modules that have the setting of offline mode


@contextlib.contextmanager
def skip_unreachable_hub() -> Iterator[None]:
    """Context in which the hub's libraries work offline if the hub cannot be reached.

    They use their caches then. Otherwise they would repeat the first request for half a minute.
    """
    if is_hub_reachable():
        yield
        return
    modules: dict[str, Any] = sys.modules
    before = {name: modules[name].HF_HUB_OFFLINE for name in SETTINGS if name in modules}
    for name in before:
        modules[name].HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for name in SETTINGS:
            if name in modules:  # datasets, imported meanwhile, has copied the setting of the hub's library
                modules[name].HF_HUB_OFFLINE = before.get(name, before[SETTINGS[0]])


def is_hub_reachable() -> bool:
    """Whether a single request can be sent to the hub."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # those of several HTTP libraries, and of offline mode
        return type(error).__name__ == "ReadTimeout"  # connected, but slow
    return True
