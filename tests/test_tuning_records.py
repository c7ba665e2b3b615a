"""A measured choice without a GPU: a fake timer, interpreted kernels, records of GPUs that are not there."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels that are timed here are interpreted", allow_module_level=True)

import fastvit
from fastvit import cli, ops
from fastvit.kernels import tuning as tiles
from fastvit.ops import cases, records, reference
from fastvit.report import info
from fastvit.tuning import Record, Timing, compiling, startup, trials, tune, tuner

CPU = torch.device("cpu")
GPU = "a GPU"


@pytest.fixture(autouse=True)
def _own_records(tmp_path, monkeypatch):
    """Empty folders for the records made here and for those of the package; few rounds."""
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(records, "_table", None)
    monkeypatch.setattr(ops, "used_records", {})
    monkeypatch.setattr(tuner, "ROUNDS", (2, 3))
    ops.import_kernels()


def forget(monkeypatch):
    """As a new process would start."""
    monkeypatch.setattr(records, "_table", None)


class Norm(nn.Module):
    """A model of one operation."""

    def __init__(self, rows=6, dtype=torch.float32):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(16, dtype=dtype)) for _ in range(2))
        self.x = nn.Parameter(torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)).to(dtype))

    def forward(self, pixels):
        return ops.layer_norm(self.x.expand(len(pixels), *self.x.shape), self.weight, self.bias, 1e-6)


def kernel(monkeypatch, operation="layer_norm", **candidates):
    """Replace a kernel by functions for its candidates: first, second, third; each is the definition if left out."""
    real = getattr(reference, operation)
    asked = []
    by_number = {0: "first", 1: "second", 2: "third"}

    def call(*args, candidate=0, **kwargs):
        asked.append(candidate)
        return candidates.get(by_number[candidate], real)(*args, **kwargs)

    monkeypatch.setitem(ops._kernels, operation, call)
    return asked


def timer(**times):
    """A timer that runs a trial, and says what it takes: by candidate, its spaces as underscores."""

    def time(trial):
        trial()
        time.trials.append(trial)
        return times.get(trial.candidate.replace(" ", "_"), 10.0)

    time.trials = []
    return time


def fake(case=None, *, winner="ours 1", gpu=GPU, **changes):
    """A record that holds for the layer norm of `Norm`."""
    case = case or cases.Case("layer_norm", "inference", (("hidden", 16),), 64, 0, "float32")
    hash_ = records.hash_kernel(ops.KERNEL_MODULES[case.operation])
    record = Record(*case, gpu, *records.get_versions(), hash_, (Timing("pytorch", 2.0), Timing("ours 1", 1.0)), winner)
    return dataclasses.replace(record, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Who wins
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
def test_ours_wins_only_if_it_is_three_per_cent_faster(times, winner):
    assert records.choose_winner([Timing(name, ms) for name, ms in times.items()]) == winner


def test_what_was_measured_is_kept_and_chosen(monkeypatch):
    asked = kernel(monkeypatch)
    (record,) = tune(Norm(), batch_size=2, timer=timer(ours_2=1.0), progress=False)
    assert record.case == ("layer_norm", "inference", (("hidden", 16),), 64, 0, "float32")
    assert (record.winner, record.choice, record.gpu) == ("ours 2", 2, "interpreter")
    assert [timing.candidate for timing in record.candidates] == ["pytorch", "ours 0", "ours 1", "ours 2"]
    assert (record.best_ms("pytorch"), record.best_ms("ours")) == (10.0, 1.0)
    asked.clear()
    for _ in range(2):
        with fastvit.backend("triton"), torch.no_grad():
            Norm()(torch.zeros(2))
            Norm(rows=30)(torch.zeros(2))  # the same bucket
            Norm(rows=90)(torch.zeros(2))  # another one
        assert asked == [2, 2, 0]
        asked.clear()
        forget(monkeypatch)  # then it is read from the file


def test_training_is_timed_and_chosen_apart_from_inference(monkeypatch):
    asked = kernel(monkeypatch)
    (record,) = tune(Norm(), batch_size=2, training=True, timer=timer(ours_1=1.0), progress=False)
    assert (record.direction, record.winner) == ("training", "ours 1")
    asked.clear()
    with fastvit.backend("triton"):
        Norm()(torch.zeros(2)).sum().backward()
        with torch.no_grad():
            Norm()(torch.zeros(2))
    assert asked == [1, 0]


def test_a_candidate_that_is_wrong_or_raises_is_left_out_and_the_reason_is_kept(monkeypatch):
    def wrong(*args):
        return 1.01 * reference.layer_norm(*args)

    def broken(*args):
        raise torch.OutOfMemoryError("no memory\nfor this")

    kernel(monkeypatch, second=wrong, third=broken)
    clock = timer(ours_0=1.0, ours_1=0.1, ours_2=0.1)
    (record,) = tune(Norm(), batch_size=2, timer=clock, progress=False)
    assert record.winner == "ours 0"
    reasons = {timing.candidate: timing.reason for timing in record.candidates}
    assert reasons["ours 1"].startswith("wrong: result 0 has a relative error of 0.01, ")
    assert reasons["ours 2"] == "OutOfMemoryError: no memory"
    assert {trial.candidate for trial in clock.trials} == {"pytorch", "ours 0"}


def test_a_wrong_gradient_and_a_nan_disqualify(monkeypatch):
    kernel(monkeypatch, first=lambda *args: reference.layer_norm(*args) * float("nan"),
           second=lambda x, w, b, eps: reference.layer_norm(x, w.detach(), b, eps) + 0 * w)  # fmt: skip
    (record,) = tune(Norm(), batch_size=2, training=True, timer=timer(ours_2=1.0), progress=False)
    reasons = {timing.candidate: timing.reason for timing in record.candidates}
    assert "result 0" in reasons["ours 0"] and "nan" in reasons["ours 0"]
    assert "result 2 has a relative error of 1" in reasons["ours 1"]
    assert record.winner == "ours 2"


def test_a_candidate_that_raises_while_it_is_timed_is_out():
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


def test_rounds_are_interleaved_and_the_first_does_not_count():
    order, times = [], {"a": [9.0, 1.0, 3.0], "b": [9.0, 2.0, 2.0]}

    def time(trial):
        order.append(trial.candidate)
        return times[trial.candidate].pop(0)

    found = tuner.time_trials([trials.Trial(None, name, None) for name in "ab"], time)
    assert order == ["a", "b"] * 3
    assert found["a"].ms == found["b"].ms == 2.0


def test_a_number_without_a_tile_of_its_own_is_no_candidate(monkeypatch):
    """The table answers its first tile where a rule has fewer."""
    rule = tiles.Rule("layer_norm_forward", None, None, None, ({"elements": 40, "num_warps": 4}, {"elements": 8}))

    def call(*args, candidate=0):
        tiles.select("layer_norm_forward", "few rows", torch.float32, CPU, candidate)
        return reference.layer_norm(*args)

    monkeypatch.setattr(tiles, "TABLE", (rule,))
    monkeypatch.setitem(ops._kernels, "layer_norm", call)
    (record,) = tune(Norm(), batch_size=2, timer=timer(), progress=False)
    assert [timing.candidate for timing in record.candidates] == ["pytorch", "ours 0", "ours 1"]


def test_attention_is_measured_beside_every_backend_of_pytorch(monkeypatch):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 5, 2, 16))

        def forward(self, pixels):
            return ops.attention(self.query, self.query, self.query)

    (record,) = tune(Attention(), batch_size=1, timer=timer(pytorch_math=1.0), progress=False)
    assert (record.winner, record.choice) == ("pytorch math", "math")
    reasons = {timing.candidate: timing.reason for timing in record.candidates}
    assert reasons["pytorch"] is None and reasons["ours 0"] is None
    assert "backend" in reasons["pytorch cudnn"]  # there is none on a CPU
    assert (record.rows, record.tokens, record.sizes) == (64, 64, (("heads", 2), ("head_dim", 16)))
    q = torch.randn(1, 5, 2, 16)
    found = ops.run_implementation("math", "attention", (q, q, q), {})
    torch.testing.assert_close(found, reference.attention(q, q, q))


def test_time_that_is_up_leaves_the_rest_unmeasured(caplog):
    assert tune(Norm(), batch_size=2, timer=timer(), progress=False, time_limit=0.0) == []
    assert "the time is up; 1 operations have no record" in caplog.text


def test_tuning_changes_nothing_but_the_records(monkeypatch):
    model = nn.Sequential(nn.Dropout(0.5), Norm()).train()
    model[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune(model, batch_size=2, training=True, timer=timer(), progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert (model.training, model[0].training, ops.current_backend()) == (True, False, "auto")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_has_a_record_is_measured_again_only_if_asked():
    clock = timer()
    assert len(tune(Norm(), batch_size=2, timer=clock, progress=False)) == 1
    assert tune(Norm(), batch_size=2, timer=clock, progress=False, keep=True) == []
    assert len(tune(Norm(), batch_size=2, timer=clock, progress=False)) == 1


def test_a_cpu_is_not_timed(capsys):
    with pytest.raises(fastvit.InputError, match="tuning: expected a model on a GPU, got one on cpu"):
        tune(Norm(), batch_size=2)
    assert startup.tune_at_start(Norm(), [(2, False)]) is None
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.startswith("error: tune: expected a GPU")
    assert not records.get_cache_path().exists()


# ---------------------------------------------------------------------------------------------------------------------
# The model's calls
# ---------------------------------------------------------------------------------------------------------------------


def small_model():
    config = fastvit.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    return fastvit.ViTForImageClassification(config)


def collected(**options):
    asked = {"batch_size": 2, "image_size": None, "training": False, "dtype": None, **options}
    with fastvit.backend("triton"):
        return tuner.collect_calls(small_model(), *asked.values())


def test_the_calls_of_a_model_are_collected_once_each():
    calls = collected()
    operations = [call.case.operation for call in calls]
    for operation in ("layer_norm_linear", "attention_packed", "add_layer_norm_feed_forward"):
        assert operations.count(operation) == 1
    sizes = [dict(call.case.sizes) for call in calls if call.case.operation == "patch_embed"]
    assert {(each["pixels"], each["layout"]) for each in sizes} == {("uint8", "BHWC"), ("floating", "BCHW")}
    assert {call.case.direction for call in calls} == {"inference"}
    assert {call.case.direction for call in collected(training=True)} == {"training"}
    larger = next(call for call in collected(image_size=32) if call.case.operation == "attention_packed")
    assert larger.specs.args[0].shape[1] == 17


def test_autocast_is_part_of_the_case():
    cast = next(call for call in collected(dtype=torch.bfloat16) if call.case.operation == "layer_norm_linear")
    assert ("autocast", "bfloat16") in cast.case.sizes
    outputs = trials.Trial(cast.case, "pytorch", cast.make_inputs(CPU))()
    assert outputs[0].dtype == torch.bfloat16
    assert cast.compute_reference(cast.make_inputs(CPU))[0].dtype == torch.float32


def test_inputs_are_made_again_with_layout_and_gradients():
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


def test_every_operation_has_the_sizes_of_its_call():
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
# The choice at a call
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Ask as an operation on a GPU would ask."""
    monkeypatch.setattr(ops, "kernel_unavailable_reason", lambda *case: None)
    monkeypatch.setattr(records, "get_gpu_name", lambda *device: GPU)
    ops._log_choice.cache_clear()
    ops._suggest_tuning.cache_clear()

    def choose(record, asked="auto"):
        return ops._choose_implementation("layer_norm", asked, "cuda", 0, torch.float32, None, tuple(record.case))

    return choose


def test_auto_goes_by_the_record_and_triton_takes_ours_anyway(gpu):
    for winner, auto, triton in (("ours 2", 2, 2), ("pytorch", "default", 0), ("pytorch flash", "flash", 0)):
        record = fake(winner=winner)
        records.adopt([record])
        assert gpu(record) == auto
        assert gpu(record, "triton") == triton
        assert record in ops.used_records.values()
    records.adopt([fake(gpu="another GPU")])
    assert (
        "layer_norm, inference, float32, hidden 16, rows up to 64: pytorch flash"
        in info.summarize_kernels()["measured"]
    )


def test_without_a_record_ours_is_taken_and_it_is_said_once_how_to_tune(gpu, caplog):
    with caplog.at_level(logging.WARNING, "fastvit"):
        assert [gpu(fake()) for _ in range(3)] == [0, 0, 0]
    assert caplog.text.count("`fastvit tune`") == 1


def test_a_process_keeps_its_answer_whatever_another_one_writes(gpu):
    records.add_to_cache([fake(winner="ours 1")])
    assert gpu(fake()) == 1
    records.add_to_cache([fake(winner="pytorch")])
    assert gpu(fake()) == 1


def test_a_record_of_other_versions_or_other_source_is_not_used(gpu):
    for change in ({"torch": "1.0"}, {"triton": "1.0"}, {"kernel": "of old"}, {"gpu": "another GPU"}):
        records.adopt([fake(**change)])
        assert gpu(fake()) == 0, change


@pytest.mark.parametrize("old", ["0" * 16, "f" * 16])
def test_a_record_of_an_older_source_does_not_hide_the_one_that_holds(gpu, monkeypatch, old):
    records.SHIPPED.mkdir()
    records.export(records.SHIPPED / "a-gpu.json", [fake(winner="ours 1")])
    records.add_to_cache([fake(kernel=old, winner="pytorch")])
    assert gpu(fake()) == 1
    records.add_to_cache([fake(winner="ours 2")])
    forget(monkeypatch)
    assert gpu(fake()) == 2


def test_a_corrupt_file_of_the_package_is_reported(gpu):
    records.SHIPPED.mkdir()
    (records.SHIPPED / "a-gpu.json").write_text("{")
    with pytest.warns(UserWarning, match=r"a-gpu\.json does not hold tuning records .*left out"):
        assert gpu(fake()) == 0


def test_own_records_win_over_those_of_the_package(gpu, monkeypatch):
    records.SHIPPED.mkdir()
    records.export(records.SHIPPED / "a-gpu.json", [fake(winner="pytorch")])
    assert gpu(fake()) == "default"
    records.add_to_cache([fake(winner="ours 2")])
    forget(monkeypatch)
    assert gpu(fake()) == 2


def count_graphs(function):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(function, backend=count, fullgraph=True, dynamic=True), graphs


def test_a_compiled_model_knows_of_tokens_the_bucket_alone():
    case = cases.Case("attention", "inference", (("heads", 2), ("head_dim", 16)), 64, 64, "float32")
    records.adopt([fake(case, gpu="interpreter", winner="ours 0")])
    torch.compiler.reset()
    compiled, graphs = count_graphs(lambda q: ops.attention(q, q, q))
    with fastvit.backend("triton"):
        for tokens, expected in ((5, 1), (9, 1), (20, 1), (31, 1), (40, 2), (35, 2)):
            query = torch.randn(2, tokens, 2, 16)
            torch.testing.assert_close(compiled(query), reference.attention(query, query, query))
            assert len(graphs) == expected, tokens


# ---------------------------------------------------------------------------------------------------------------------
# What makes a record stale
# ---------------------------------------------------------------------------------------------------------------------

SOURCE = '''
"""A kernel."""
import triton
from fastvit.kernels import helpers
from fastvit.kernels.operators import register

LOG2E: tl.constexpr = 1.44

@triton.jit
def _forward(x_ptr, ROWS: tl.constexpr):
    """What it does."""
    return x_ptr + ROWS  # a comment

def _launch():
    tuning.select("layer_norm_forward", 1)
'''


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """The hash of kernel files with this content."""
    monkeypatch.setattr(records, "KERNELS_FOLDER", tmp_path)

    def compute(source=SOURCE, helper="@triton.jit\ndef _add(a):\n    return a + 1\n"):
        (tmp_path / "norm.py").write_text(source)
        (tmp_path / "helpers.py").write_text(helper)
        records.hash_kernel.cache_clear()
        try:
            return records.hash_kernel("norm")
        finally:
            records.hash_kernel.cache_clear()

    return compute


def test_the_hash_follows_code_and_tiles_and_not_comments(hash_of, monkeypatch):
    before = hash_of()
    for same in (
        SOURCE.replace("What it does.", "Other words."),
        SOURCE.replace("a comment", "another comment"),
        SOURCE.replace('"""A kernel."""', ""),
        SOURCE + "\n\n",
    ):
        assert hash_of(same) == before
    for other in (
        SOURCE.replace("x_ptr + ROWS", "x_ptr - ROWS"),
        SOURCE.replace("1.44", "1.45"),
        SOURCE.replace("_forward(", "_first("),
        SOURCE.replace("def _launch():", "def _launch():\n    check()"),
    ):
        assert hash_of(other) != before
    assert hash_of(helper="@triton.jit\ndef _add(a):\n    return a + 2\n") != before
    monkeypatch.setattr(tiles, "TABLE", tuple(rule for rule in tiles.TABLE if rule.operation != "attention_forward"))
    assert hash_of() == before
    monkeypatch.setattr(tiles, "TABLE", tuple(rule for rule in tiles.TABLE if rule.operation != "layer_norm_forward"))
    assert hash_of() != before


def test_every_kernel_module_has_a_hash():
    hashes = {module: records.hash_kernel(module) for module in ops.KERNEL_MODULES.values()}
    assert all(len(value) == 16 for value in hashes.values())
    assert hashes["attention"] != hashes["layer_norm"]


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = fake(candidates=(Timing("pytorch", 1.5), Timing("ours 0", None, "wrong: ...")))
    records.export(tmp_path / "folder" / "sent.json", [record])
    assert list(records.read(tmp_path / "folder" / "sent.json").values()) == [record]


@pytest.mark.parametrize(
    "content",
    [b"{", b'{"a": 1}', b"\xff\xfe", b"", b"[" * 100_000],
    ids=["cut off", "no list", "not text", "empty", "nested"],
)
def test_a_corrupt_file_is_reported_and_rewritten(content):
    records.get_cache_path().parent.mkdir(parents=True)
    records.get_cache_path().write_bytes(content)
    with pytest.warns(UserWarning, match=r"records\.json does not hold tuning records"):
        assert records.get_table() == {}
    assert json.loads(records.get_cache_path().read_text()) == []


def test_a_record_that_is_not_whole_is_left_out():
    good = fake()
    records.add_to_cache([good])
    entries = json.loads(records.get_cache_path().read_text())
    broken = [{"operation": "layer_norm"}, 3, {**entries[0], "sizes": [["a", []]]}]
    winners = ("ours x", "ours 99", "ours -1", "pytorch foo", "nobody", "")
    broken += [{**entries[0], "winner": winner} for winner in winners]
    records.get_cache_path().write_text(json.dumps([*broken, *entries]))
    assert list(records.get_table()[GPU].values()) == [good]


def test_records_that_cannot_be_kept_are_reported_and_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "file" / "cache"))  # no folder can be made there
    with pytest.warns(UserWarning, match="tuning records are not saved"):
        (record,) = tune(Norm(), batch_size=2, timer=timer(ours_0=1.0), progress=False)
    assert records.find(record.case, "interpreter", "layer_norm") == record


@pytest.mark.filterwarnings("error")
def test_processes_may_write_at_once():
    """None of what several processes add is lost, and what a reader sees is always whole."""
    code = (
        "import sys\nfrom fastvit.ops import records\nfrom fastvit.tuning import Record\n"
        "for i in range(15):\n"
        "    records.add_to_cache([Record('layer_norm', 'inference', (('hidden', i),), 64, 0, 'float32', sys.argv[1],"
        " '1', '1', 'hash', (), 'pytorch')])\n"
    )
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(subprocess.run, [sys.executable, "-c", code, name], check=True) for name in "ab"]
        while not all(writer.done() for writer in writers):
            assert isinstance(records.read_cache(), dict)
        for writer in writers:
            writer.result()
    assert len(records.read_cache()) == 30
    assert {path.name for path in records.get_cache_path().parent.iterdir()} <= {"records.json", "records.lock"}


# ---------------------------------------------------------------------------------------------------------------------
# Other processes
# ---------------------------------------------------------------------------------------------------------------------


def norm_call(operation="layer_norm"):
    inputs = torch.randn(4, 16), torch.ones(16), torch.zeros(16), 1e-6
    return trials.Call.from_arguments(
        cases.Case(operation, "inference", (("hidden", 16),), 64, 0, "float32"), inputs, {}
    )


def test_candidates_are_run_in_other_processes_and_one_that_breaks_the_gpu_is_told(monkeypatch):
    monkeypatch.setattr(compiling, "count_processes", lambda *args: 2)
    monkeypatch.setattr(os, "environ", {**os.environ, "TRITON_INTERPRET": "1"})
    jobs = [(norm_call(), "ours 0"), (norm_call("no operation"), "ours 0")]
    monkeypatch.setattr(compiling, "FATAL", ("KeyError",))
    assert list(compiling.compile_ahead(jobs, CPU, 200.0)) == [1]


def test_processes_that_do_not_start_or_do_not_end_only_mean_compiling_later(monkeypatch):
    monkeypatch.setattr(compiling, "count_processes", lambda *args: 2)
    jobs = [(norm_call(), "ours 0")] * 2
    monkeypatch.setattr(sys, "executable", "false")
    assert compiling.compile_ahead(jobs, CPU, 100.0) == {}
    monkeypatch.setattr(sys, "executable", "yes")  # never ends
    assert compiling.compile_ahead(jobs, CPU, 0.1) == {}


def test_no_more_processes_than_there_is_memory_for(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    jobs = [(norm_call(), "ours 0")] * 12
    for gigabytes, expected in ((100, 12), (10, 3), (2, 0)):
        memory = types.SimpleNamespace(available=gigabytes * 2**30)
        monkeypatch.setattr(compiling.psutil, "virtual_memory", lambda memory=memory: memory)
        assert compiling.count_processes(jobs, CPU) == expected


def test_the_first_process_measures_and_all_go_by_its_records(tmp_path):
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


class OnGpu:
    """As far as the start looks at a model."""

    def parameters(self):
        yield types.SimpleNamespace(device=torch.device("cuda", 0))


def test_the_start_measures_what_is_missing_within_its_time(monkeypatch, caplog):
    asked = []

    def measure(model, **options):
        asked.append(options)
        return [fake(winner="ours 1"), fake(winner="pytorch")]

    monkeypatch.setattr(startup, "tune", measure)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(records, "get_gpu_name", lambda *device: GPU)
    line = startup.tune_at_start(OnGpu(), [(64, True), (32, False)], torch.bfloat16)
    assert "measured 4 operations on this GPU in 0 s, at most 60: our kernels are faster in 2" in line
    assert [(each["batch_size"], each["training"], each["keep"]) for each in asked] == [
        (64, True, True), (32, False, True)
    ]  # fmt: skip
    assert all(0 < each["time_limit"] <= 60 for each in asked)
    monkeypatch.setattr(startup, "tune", lambda *args, **options: [])
    assert startup.tune_at_start(OnGpu(), [(64, True)]) is None

    def broken(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(startup, "tune", broken)
    assert startup.tune_at_start(OnGpu(), [(64, True)]) is None
    assert "tuning at the start failed: OutOfMemoryError: no memory" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------


def test_the_table_names_times_and_winners():
    from fastvit.cli import tune as command

    lost = fake(winner="pytorch", candidates=(Timing("pytorch", 0.25), Timing("ours 0", None, "wrong")))
    lines = command.format_table([fake(), lost]).splitlines()
    assert lines[0].split() == ["operation", "sizes", "rows", "tokens", "PyTorch", "ms", "ours", "ms", "winner"]
    assert lines[1].split() == ["layer_norm", "hidden", "16", "<=", "64", "2.000", "1.000", "ours", "1"]
    assert lines[2].split() == ["layer_norm", "hidden", "16", "<=", "64", "0.250", "-", "pytorch"]


def test_a_named_size_needs_no_weights():
    from fastvit.cli import tune as command

    model = command.load_model("micro", 32)
    assert (model.config.hidden_size, model.config.image_size) == (96, 32)
    with pytest.raises(fastvit.InputError, match="found no folder 'huge'"):
        command.load_model("huge", None)


def test_info_lists_the_records_of_this_gpu(monkeypatch):
    monkeypatch.setattr(records, "get_gpu_name", lambda *device: GPU)
    assert "no records of measurements on this GPU" in info.list_measurements(torch.device("cuda", 0))[0]
    records.adopt([fake(), fake(gpu="another GPU")])
    lines = info.list_measurements(torch.device("cuda", 0))
    assert lines == ["measured on this GPU:", "  layer_norm, inference, float32, hidden 16, rows up to 64: ours 1"]


# ---------------------------------------------------------------------------------------------------------------------
# Who begins with it
# ---------------------------------------------------------------------------------------------------------------------


def test_fine_tuning_measures_training_and_evaluation(monkeypatch, capsys):
    from fastvit.train import finetune
    from fastvit.train.options import parse_options

    asked = []
    monkeypatch.setattr(finetune, "tune_at_start", lambda *args, **options: asked.append((args, options)) or "measured")
    sizes = types.SimpleNamespace(per_device_train_batch_size=16, per_device_eval_batch_size=32)
    finetune.tune_operations(types.SimpleNamespace(model="model", args=sizes), "bf16")
    assert asked == [(("model", [(16, True), (32, False)], torch.bfloat16), {"is_distributed": True})]
    assert capsys.readouterr().out == "measured (--no-tune skips this)\n"
    assert parse_options(["--dataset", "generated"]).tune
    assert not parse_options(["--dataset", "generated", "--no-tune"]).tune


def test_a_predictor_measures_a_lone_image_and_its_largest_batch(monkeypatch, caplog):
    from transformers import ViTImageProcessorPil

    from fastvit.serve import predictor

    asked = []
    monkeypatch.setattr(predictor, "tune_at_start", lambda model, wanted: asked.append(wanted) or "measured")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    with caplog.at_level(logging.INFO, "fastvit"):
        fastvit.Predictor(small_model(), max_batch=8, image_processor=processor).close()
    assert asked == [[(8, False), (1, False)]]
    assert "measured (tune=False leaves this out)" in caplog.text
    fastvit.Predictor(small_model(), max_batch=1, image_processor=processor, tune=False).close()
    assert len(asked) == 1
