"""timm for tests, also where the torchvision that it requires cannot be imported."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import MagicMock

import pytest


class _StandIn:
    """Finds every module of torchvision, with every name in it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> MagicMock:
        return MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module: MagicMock) -> None:
        pass


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


@contextmanager
def _replace_torchvision() -> Iterator[None]:
    """Only for as long as timm is imported: transformers uses torchvision wherever it finds it."""
    finder = _StandIn()
    _forget_torchvision()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget_torchvision()


def import_timm(module: str = "timm") -> ModuleType:
    """Import timm, or one of its modules. Without timm the test is skipped.

    Published builds of torchvision are for PyTorch with CUDA; beside a CPU build of PyTorch they fail to import. timm's
    data pipeline uses torchvision and its VisionTransformer does not, so that a stand-in is enough to import it.
    """
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    try:
        return import_module(module)
    except (ImportError, RuntimeError):  # RuntimeError: "operator torchvision::nms does not exist"
        with _replace_torchvision():
            return import_module(module)
