"""Measuring the candidates of a model's operations, with a fake timer and interpreted kernels."""

import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels that are timed here are interpreted", allow_module_level=True)

from tuning_fakes import CPU, GPU, Norm, clear_record_table, make_model, make_record, make_timer, replace_kernel
from tuning_fakes import own_records as own_records  # an autouse fixture

import fastvit
from fastvit import cli, ops
from fastvit.kernels import tuning as tiles
from fastvit.ops import cases, records, reference
from fastvit.tuning import Timing, compiling, startup, trials, tune, tuner

# ---------------------------------------------------------------------------------------------------------------------
# Measuring and choosing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times, winner",
    [
        ({"pytorch": 1.0, "ours 0": 0.98}, "pytorch"),
        ({"pytorch": 1.0, "ours 0": 0.96}, "ours 0"),
        ({"pytorch": 1.0, "ours 0": 0.96, "ours 1": 0.95}, "ours 1"),
        ({"pytorch": 1.0, "pytorch flash": 0.9, "ours 0": 0.89}, "pytorch flash"),
        ({"pytorch": 1.0, "pytorch flash": 0.98, "ours 0": 0.965}, "pytorch"),
        ({"pytorch": None, "pytorch flash": 0.98, "ours 0": 0.97}, "pytorch flash"),
        ({"pytorch": None, "ours 0": 5.0}, "ours 0"),
        ({"pytorch": 5.0, "ours 0": None}, "pytorch"),
        ({"pytorch": None, "ours 0": None}, None),
    ],
)
def test_kernels_win_only_if_three_per_cent_faster(times, winner):
    assert records.choose_winner([Timing(name, ms) for name, ms in times.items()]) == winner


def test_measured_winner_is_stored_and_used(monkeypatch):
    requested = replace_kernel(monkeypatch)
    (record,) = tune(Norm(), batch_size=2, timer=make_timer(ours_2=1.0), progress=False)
    assert record.case == ("layer_norm", "inference", (("hidden", 16),), 64, 0, "float32")
    assert (record.winner, record.choice, record.gpu) == ("ours 2", 2, "interpreter")
    assert [timing.candidate for timing in record.candidates] == ["pytorch", "ours 0", "ours 1", "ours 2"]
    assert (record.best_ms("pytorch"), record.best_ms("ours")) == (10.0, 1.0)
    requested.clear()
    for _ in range(2):
        with fastvit.backend("triton"), torch.no_grad():
            Norm()(torch.zeros(2))
            Norm(rows=30)(torch.zeros(2))  # same bucket
            Norm(rows=90)(torch.zeros(2))  # another bucket
        assert requested == [2, 2, 0]
        requested.clear()
        clear_record_table(monkeypatch)  # read it from the file next


def test_training_and_inference_are_tuned_separately(monkeypatch):
    requested = replace_kernel(monkeypatch)
    (record,) = tune(Norm(), batch_size=2, training=True, timer=make_timer(ours_1=1.0), progress=False)
    assert (record.direction, record.winner) == ("training", "ours 1")
    requested.clear()
    with fastvit.backend("triton"):
        Norm()(torch.zeros(2)).sum().backward()
        with torch.no_grad():
            Norm()(torch.zeros(2))
    assert requested == [1, 0]


def test_wrong_or_failing_candidates_are_excluded_with_a_reason(monkeypatch):
    def wrong(*args):
        return 1.01 * reference.layer_norm(*args)

    def fail(*args):
        raise torch.OutOfMemoryError("no memory\nfor this")

    replace_kernel(monkeypatch, second=wrong, third=fail)
    clock = make_timer(ours_0=1.0, ours_1=0.1, ours_2=0.1)
    (record,) = tune(Norm(), batch_size=2, timer=clock, progress=False)
    assert record.winner == "ours 0"
    reasons = {timing.candidate: timing.reason for timing in record.candidates}
    assert reasons["ours 1"].startswith("wrong: result 0 has a relative error of 0.01, ")
    assert reasons["ours 2"] == "OutOfMemoryError: no memory"
    assert {trial.candidate for trial in clock.trials} == {"pytorch", "ours 0"}


def test_wrong_gradients_and_nan_exclude_a_candidate(monkeypatch):
    replace_kernel(monkeypatch, first=lambda *args: reference.layer_norm(*args) * float("nan"),
           second=lambda x, w, b, eps: reference.layer_norm(x, w.detach(), b, eps) + 0 * w)  # fmt: skip
    (record,) = tune(Norm(), batch_size=2, training=True, timer=make_timer(ours_2=1.0), progress=False)
    reasons = {timing.candidate: timing.reason for timing in record.candidates}
    assert "result 0" in reasons["ours 0"] and "nan" in reasons["ours 0"]
    assert "result 2 has a relative error of 1" in reasons["ours 1"]
    assert record.winner == "ours 2"


def test_candidate_that_fails_while_timed_is_excluded():
    calls = {"good": 0, "bad": 0}

    def time(trial):
        calls[trial.candidate] += 1
        if trial.candidate == "bad" and calls["bad"] == 2:
            raise RuntimeError("CUDA error: misaligned address")
        return 1.0

    found = tuner.time_trials([trials.Trial(None, name, None) for name in calls], time)
    assert found["good"] == Timing("good", 1.0)
    assert found["bad"] == Timing("bad", None, "RuntimeError: CUDA error: misaligned address")
    assert calls["bad"] == 2


def test_rounds_are_interleaved_and_the_first_is_discarded():
    order, times = [], {"a": [9.0, 1.0, 3.0], "b": [9.0, 2.0, 2.0]}

    def time(trial):
        order.append(trial.candidate)
        return times[trial.candidate].pop(0)

    found = tuner.time_trials([trials.Trial(None, name, None) for name in "ab"], time)
    assert order == ["a", "b"] * 3
    assert found["a"].ms == found["b"].ms == 2.0


def test_candidates_without_a_tile_of_their_own_are_skipped(monkeypatch):
    """If a rule has fewer candidates, the table returns its first one again."""
    rule = tiles.Rule("layer_norm_forward", None, None, None, ({"elements": 40, "num_warps": 4}, {"elements": 8}))

    def call(*args, candidate=0):
        tiles.select("layer_norm_forward", "few rows", torch.float32, CPU, candidate)
        return reference.layer_norm(*args)

    monkeypatch.setattr(tiles, "TABLE", (rule,))
    monkeypatch.setitem(ops._kernels, "layer_norm", call)
    (record,) = tune(Norm(), batch_size=2, timer=make_timer(), progress=False)
    assert [timing.candidate for timing in record.candidates] == ["pytorch", "ours 0", "ours 1"]


def test_attention_is_compared_with_every_pytorch_backend(monkeypatch):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 5, 2, 16))

        def forward(self, pixels):
            return ops.attention(self.query, self.query, self.query)

    (record,) = tune(Attention(), batch_size=1, timer=make_timer(pytorch_math=1.0), progress=False)
    assert (record.winner, record.choice) == ("pytorch math", "math")
    reasons = {timing.candidate: timing.reason for timing in record.candidates}
    assert reasons["pytorch"] is None and reasons["ours 0"] is None
    assert "backend" in reasons["pytorch cudnn"]  # there is none on a CPU
    assert (record.rows, record.tokens, record.sizes) == (64, 64, (("heads", 2), ("head_dim", 16)))
    q = torch.randn(1, 5, 2, 16)
    found = ops.run_implementation("math", "attention", (q, q, q), {})
    torch.testing.assert_close(found, reference.attention(q, q, q))


def test_time_limit_leaves_operations_unmeasured(caplog):
    assert tune(Norm(), batch_size=2, timer=make_timer(), progress=False, time_limit=0.0) == []
    assert "the time is up; 1 operations have no record" in caplog.text


def test_tuning_restores_all_other_state(monkeypatch):
    model = nn.Sequential(nn.Dropout(0.5), Norm()).train()
    model[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune(model, batch_size=2, training=True, timer=make_timer(), progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert (model.training, model[0].training, ops.current_backend()) == (True, False, "auto")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_keep_skips_operations_that_have_a_record():
    clock = make_timer()
    assert len(tune(Norm(), batch_size=2, timer=clock, progress=False)) == 1
    assert tune(Norm(), batch_size=2, timer=clock, progress=False, keep=True) == []
    assert len(tune(Norm(), batch_size=2, timer=clock, progress=False)) == 1


def test_tuning_on_a_cpu_raises(capsys):
    with pytest.raises(fastvit.InputError, match="tuning: expected a model on a GPU, got one on cpu"):
        tune(Norm(), batch_size=2)
    assert startup.tune_at_start(Norm(), [(2, False)]) is None
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.startswith("error: tune: expected a GPU")
    assert not records.get_cache_path().exists()


# ---------------------------------------------------------------------------------------------------------------------
# The model's calls
# ---------------------------------------------------------------------------------------------------------------------


def collect_model_calls(**options):
    requested = {"batch_size": 2, "image_size": None, "training": False, "dtype": None, **options}
    with fastvit.backend("triton"):
        return tuner.collect_calls(make_model(), *requested.values())


def test_each_call_of_a_model_is_collected_once():
    calls = collect_model_calls()
    operations = [call.case.operation for call in calls]
    for operation in ("layer_norm_linear", "attention_packed", "add_layer_norm_feed_forward"):
        assert operations.count(operation) == 1
    sizes = [dict(call.case.sizes) for call in calls if call.case.operation == "patch_embed"]
    assert {(each["pixels"], each["layout"]) for each in sizes} == {("uint8", "BHWC"), ("floating", "BCHW")}
    assert {call.case.direction for call in calls} == {"inference"}
    assert {call.case.direction for call in collect_model_calls(training=True)} == {"training"}
    larger = next(call for call in collect_model_calls(image_size=32) if call.case.operation == "attention_packed")
    assert larger.specs.args[0].shape[1] == 17


def test_autocast_is_part_of_the_case():
    cast = next(
        call for call in collect_model_calls(dtype=torch.bfloat16) if call.case.operation == "layer_norm_linear"
    )
    assert ("autocast", "bfloat16") in cast.case.sizes
    outputs = trials.Trial(cast.case, "pytorch", cast.make_inputs(CPU))()
    assert outputs[0].dtype == torch.bfloat16
    assert cast.compute_reference(cast.make_inputs(CPU))[0].dtype == torch.float32


def test_recreated_inputs_have_the_same_layout_and_requires_grad():
    packed = torch.randn(2, 5, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    query, mask = packed.unbind(2)[0], torch.rand(1, 1, 5, 5) < 0.5
    expanded = torch.zeros(1, 3).expand(4, 3)
    case = cases.Case("attention", "inference", (), 64, 64, "bfloat16")
    call = trials.Call.from_arguments(case, (query, expanded, 0.5), {"mask": mask})
    (made, wide, number), kwargs, _ = call.make_inputs(CPU)
    assert (made.shape, made.stride(), made.dtype, made.requires_grad) == (
        query.shape, query.stride(), query.dtype, True
    )  # fmt: skip
    assert wide.stride() == (0, 1) and number == 0.5
    assert torch.equal(kwargs["mask"], mask)
    assert torch.equal(made, call.make_inputs(CPU).args[0])


@pytest.mark.parametrize(
    "count, rows, tokens", [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 128, 128), (197, 256, 256),
                            (500, 512, 512), (577, 1024, 1024), (50432, 65536, 65536)]
)  # fmt: skip
def test_buckets(count, rows, tokens):
    assert (cases.row_bucket(count), cases.token_bucket(count)) == (rows, tokens)


def test_cases_have_the_sizes_of_their_call():
    x, square, vector = torch.zeros(2, 3, 8), torch.zeros(8, 8), torch.zeros(8)
    qkv = torch.zeros(2, 3, 48)
    calls = {
        "layer_norm": ((x, vector, vector, 1e-6), {"hidden": 8}, 0),
        "add_layer_norm": ((x, x, vector, vector, 1e-6), {"hidden": 8}, 0),
        "layer_norm_linear": ((x, vector, vector, 1e-6, qkv[0].T, None), {"hidden": 8, "units": 48}, 0),
        "add_layer_norm_linear": ((x, x, vector, vector, 1e-6, square, None), {"hidden": 8, "units": 8}, 0),
        "feed_forward": ((x, square, None, square, None, "gelu"), {"hidden": 8, "units": 8, "activation": "gelu"}, 0),
        "attention_packed": ((qkv,), {"heads": 1, "head_dim": 16}, 64),
        "swiglu": ((x,), {"units": 4}, 0),
        "bias_gelu": ((x, vector), {"units": 8, "activation": "gelu"}, 0),
        "layer_norm_act": ((x, vector, vector, 1e-6), {"hidden": 8, "activation": "gelu"}, 0),
    }
    for operation, (args, sizes, tokens) in calls.items():
        kwargs = {"num_heads": 1} if operation == "attention_packed" else {}
        case = cases.Case(*cases.make_case(operation, x, args, kwargs))
        assert (dict(case.sizes), case.rows, case.tokens) == (sizes, 64, tokens), operation
    bounds = torch.tensor([0, 3])
    assert cases.make_case("attention_packed", qkv, (qkv[0],), {"num_heads": 1, "cu_seqlens": bounds}) is None
    assert cases.make_case("linear_fp8", x, (x,), {}) is None
    fp8 = {"quantize_rows", "layer_norm_fp8", "add_layer_norm_fp8", "bias_gelu_fp8", "linear_fp8"}
    assert set(ops.KERNEL_MODULES) - set(cases.SIZE_READERS) == fp8


# ---------------------------------------------------------------------------------------------------------------------
# Other processes
# ---------------------------------------------------------------------------------------------------------------------


def make_norm_call(operation="layer_norm"):
    inputs = torch.randn(4, 16), torch.ones(16), torch.zeros(16), 1e-6
    return trials.Call.from_arguments(
        cases.Case(operation, "inference", (("hidden", 16),), 64, 0, "float32"), inputs, {}
    )


def test_candidates_compile_in_other_processes_and_fatal_errors_are_reported(monkeypatch):
    monkeypatch.setattr(compiling, "count_processes", lambda *args: 2)
    monkeypatch.setattr(os, "environ", {**os.environ, "TRITON_INTERPRET": "1"})
    jobs = [(make_norm_call(), "ours 0"), (make_norm_call("no operation"), "ours 0")]
    monkeypatch.setattr(compiling, "FATAL", ("KeyError",))
    assert list(compiling.compile_ahead(jobs, CPU, 200.0)) == [1]


def test_compile_processes_that_do_not_start_or_end_are_ignored(monkeypatch):
    monkeypatch.setattr(compiling, "count_processes", lambda *args: 2)
    jobs = [(make_norm_call(), "ours 0")] * 2
    monkeypatch.setattr(sys, "executable", "false")
    assert compiling.compile_ahead(jobs, CPU, 100.0) == {}
    monkeypatch.setattr(sys, "executable", "yes")  # never ends
    assert compiling.compile_ahead(jobs, CPU, 0.1) == {}


def test_number_of_compile_processes_is_limited_by_memory(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    jobs = [(make_norm_call(), "ours 0")] * 12
    for gigabytes, expected in ((100, 12), (10, 3), (2, 0)):
        memory = types.SimpleNamespace(available=gigabytes * 2**30)
        monkeypatch.setattr(compiling.psutil, "virtual_memory", lambda memory=memory: memory)
        assert compiling.count_processes(jobs, CPU) == expected


def test_rank_zero_measures_and_all_ranks_use_its_records(tmp_path):
    code = """
import sys, dataclasses, torch, torch.distributed as dist
from fastvit.ops import records
from fastvit.tuning import Record, startup
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
record = Record("layer_norm", "inference", (("hidden", 16),), 64, 0, "float32", "a GPU", *records.get_versions(),
                "hash", (), "pytorch")
def measure(model, **options):
    assert rank == 0
    records.adopt([record])
    return [record]
startup.tune = measure
torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = lambda *device: None
records.get_gpu_name = lambda *device: "a GPU"
class Model:
    def parameters(self): yield type("P", (), {"device": torch.device("cuda", 0)})
line = startup.tune_at_start(Model(), [(2, True)], is_distributed=True)
assert (line is None) == (rank == 1), line
assert records.get_table()["a GPU"][record.case, record.kernel] == record
dist.destroy_process_group()
"""
    environments = [{**os.environ, "FASTVIT_CACHE_DIR": str(tmp_path / f"cache {rank}")} for rank in range(2)]
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env, stderr=subprocess.PIPE, text=True)
        for rank, env in enumerate(environments)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]


class FakeGpuModel:
    """What tuning at the start needs of a model."""

    def parameters(self):
        yield types.SimpleNamespace(device=torch.device("cuda", 0))


def test_tuning_at_start_measures_missing_operations_within_its_time_limit(monkeypatch, caplog):
    requested = []

    def measure(model, **options):
        requested.append(options)
        return [make_record(winner="ours 1"), make_record(winner="pytorch")]

    monkeypatch.setattr(startup, "tune", measure)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(records, "get_gpu_name", lambda *device: GPU)
    line = startup.tune_at_start(FakeGpuModel(), [(64, True), (32, False)], torch.bfloat16)
    assert "measured 4 operations on this GPU in 0 s, at most 60: our kernels are faster in 2" in line
    assert [(each["batch_size"], each["training"], each["keep"]) for each in requested] == [
        (64, True, True), (32, False, True)
    ]  # fmt: skip
    assert all(0 < each["time_limit"] <= 60 for each in requested)
    monkeypatch.setattr(startup, "tune", lambda *args, **options: [])
    assert startup.tune_at_start(FakeGpuModel(), [(64, True)]) is None

    def fail(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(startup, "tune", fail)
    assert startup.tune_at_start(FakeGpuModel(), [(64, True)]) is None
    assert "tuning at the start failed: OutOfMemoryError: no memory" in caplog.text
