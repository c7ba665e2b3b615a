"""The table of tiles: every kernel, dtype and kind of GPU has a line."""

import pytest
import torch

pytest.importorskip("triton")
from fastvit.kernels import tuning

GPU = torch.device("cuda", 0)


def test_every_kernel_and_kind_of_gpu_has_a_tile(monkeypatch):
    for architecture in ("interpreter", "sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"):
        monkeypatch.setattr(tuning, "describe_device", lambda device, a=architecture: tuning.Device("some GPU", a, 132))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for operation in ("layer_norm_forward", "layer_norm_backward"):
                assert tuning.find_candidates(operation, "few rows, 64", dtype, GPU)
            for operation in ("patch_embed_forward", "patch_embed_weight"):
                for many in ("many", "few"):
                    assert tuning.find_candidates(operation, f"{many} tiles", dtype, GPU)
    with pytest.raises(KeyError, match="no tile for convolution"):
        tuning.find_candidates("convolution", "", torch.float32, GPU)
