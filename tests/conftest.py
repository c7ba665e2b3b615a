"""Without a GPU, kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()
