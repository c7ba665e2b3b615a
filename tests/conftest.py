"""Settings that precede every import: no test contacts the hub, and without a GPU kernels run in the interpreter."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["FASTVIT_RUNTIME"] = "torch"  # converting each test's model for OpenVINO would take a second

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()

if os.environ.get("CI"):  # the same examples in each run: a failure is due to the change under test
    import hypothesis

    hypothesis.settings.register_profile("ci", derandomize=True)
    hypothesis.settings.load_profile("ci")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The test runs in a folder of its own, and its caches lie there."""
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
