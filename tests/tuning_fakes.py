"""Fakes for tests of tuning: empty record folders, a model of one operation, kernels, timers and records."""

import dataclasses

import pytest
import torch
from torch import nn

import fastvit
from fastvit import ops
from fastvit.ops import cases, records, reference
from fastvit.tuning import Record, Timing, tuner

CPU = torch.device("cpu")
GPU = "a GPU"


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    """Use empty folders for own and shipped records, and few rounds of measurements."""
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(records, "_table", None)
    monkeypatch.setattr(ops, "used_records", {})
    monkeypatch.setattr(tuner, "ROUNDS", (2, 3))
    ops.import_kernels()


def clear_record_table(monkeypatch):
    """Forget the records read so far, as in a new process."""
    monkeypatch.setattr(records, "_table", None)


class Norm(nn.Module):
    """A model of one operation."""

    def __init__(self, rows=6, dtype=torch.float32):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(16, dtype=dtype)) for _ in range(2))
        self.x = nn.Parameter(torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)).to(dtype))

    def forward(self, pixels):
        return ops.layer_norm(self.x.expand(len(pixels), *self.x.shape), self.weight, self.bias, 1e-6)


def replace_kernel(monkeypatch, operation="layer_norm", **candidates):
    """Replace the candidates of a kernel by functions: first, second, third. The default is the reference."""
    real = getattr(reference, operation)
    requested = []
    by_number = {0: "first", 1: "second", 2: "third"}

    def call(*args, candidate=0, **kwargs):
        requested.append(candidate)
        return candidates.get(by_number[candidate], real)(*args, **kwargs)

    monkeypatch.setitem(ops._kernels, operation, call)
    return requested


def make_timer(**times):
    """Make a timer that runs a trial and returns a given time: by candidate, with underscores for spaces."""

    def time(trial):
        trial()
        time.trials.append(trial)
        return times.get(trial.candidate.replace(" ", "_"), 10.0)

    time.trials = []
    return time


def make_record(case=None, *, winner="ours 1", gpu=GPU, **changes):
    """Make a record that is valid for the layer norm of `Norm`."""
    case = case or cases.Case("layer_norm", "inference", (("hidden", 16),), 64, 0, "float32")
    hash_ = records.hash_kernel(ops.KERNEL_MODULES[case.operation])
    record = Record(*case, gpu, *records.get_versions(), hash_, (Timing("pytorch", 2.0), Timing("ours 1", 1.0)), winner)
    return dataclasses.replace(record, **changes)


def make_model():
    config = fastvit.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    return fastvit.ViTForImageClassification(config)
