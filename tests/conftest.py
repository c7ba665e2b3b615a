"""What must be decided before anything is imported: no test asks the hub, and without a GPU kernels are interpreted."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()

if os.environ.get("CI"):  # the same examples in each run: a failure is one of the change that is tested
    import hypothesis

    hypothesis.settings.register_profile("ci", derandomize=True)
    hypothesis.settings.load_profile("ci")
