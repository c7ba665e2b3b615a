"""Tuning records: how a call uses them, what invalidates them, their files, and the commands that use them."""

import json
import logging
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels that are timed here are interpreted", allow_module_level=True)

from tuning_fakes import GPU, Norm, clear_record_table, make_model, make_record, make_timer
from tuning_fakes import own_records as own_records  # an autouse fixture

import fastvit
from fastvit import ops
from fastvit.kernels import tuning as tiles
from fastvit.ops import cases, records, reference
from fastvit.report import info
from fastvit.tuning import Timing, tune

# ---------------------------------------------------------------------------------------------------------------------
# The choice of an implementation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that chooses an implementation as for an operation on a GPU."""
    monkeypatch.setattr(ops, "kernel_unavailable_reason", lambda *case: None)
    monkeypatch.setattr(records, "get_gpu_name", lambda *device: GPU)
    ops._log_choice.cache_clear()
    ops._suggest_tuning.cache_clear()

    def choose(record, requested="auto"):
        return ops._choose_implementation("layer_norm", requested, "cuda", 0, torch.float32, None, tuple(record.case))

    return choose


def test_auto_follows_the_record_and_triton_always_uses_the_kernel(gpu):
    for winner, auto, triton in (("ours 2", 2, 2), ("pytorch", "default", 0), ("pytorch flash", "flash", 0)):
        record = make_record(winner=winner)
        records.adopt([record])
        assert gpu(record) == auto
        assert gpu(record, "triton") == triton
        assert record in ops.used_records.values()
    records.adopt([make_record(gpu="another GPU")])
    assert (
        "layer_norm, inference, float32, hidden 16, rows up to 64: pytorch flash"
        in info.summarize_kernels()["measured"]
    )


def test_without_a_record_the_kernel_runs_and_tuning_is_suggested_once(gpu, caplog):
    with caplog.at_level(logging.WARNING, "fastvit"):
        assert [gpu(make_record()) for _ in range(3)] == [0, 0, 0]
    assert caplog.text.count("`fastvit tune`") == 1


def test_choice_is_constant_within_a_process(gpu):
    records.add_to_cache([make_record(winner="ours 1")])
    assert gpu(make_record()) == 1
    records.add_to_cache([make_record(winner="pytorch")])
    assert gpu(make_record()) == 1


def test_record_of_other_versions_or_source_is_ignored(gpu):
    for change in ({"torch": "1.0"}, {"triton": "1.0"}, {"kernel": "of old"}, {"gpu": "another GPU"}):
        records.adopt([make_record(**change)])
        assert gpu(make_record()) == 0, change


@pytest.mark.parametrize("old", ["0" * 16, "f" * 16])
def test_record_of_an_older_source_does_not_hide_a_valid_one(gpu, monkeypatch, old):
    records.SHIPPED.mkdir()
    records.export(records.SHIPPED / "a-gpu.json", [make_record(winner="ours 1")])
    records.add_to_cache([make_record(kernel=old, winner="pytorch")])
    assert gpu(make_record()) == 1
    records.add_to_cache([make_record(winner="ours 2")])
    clear_record_table(monkeypatch)
    assert gpu(make_record()) == 2


def test_corrupt_shipped_file_warns(gpu):
    records.SHIPPED.mkdir()
    (records.SHIPPED / "a-gpu.json").write_text("{")
    with pytest.warns(UserWarning, match=r"a-gpu\.json does not hold tuning records .*left out"):
        assert gpu(make_record()) == 0


def test_own_records_override_shipped_records(gpu, monkeypatch):
    records.SHIPPED.mkdir()
    records.export(records.SHIPPED / "a-gpu.json", [make_record(winner="pytorch")])
    assert gpu(make_record()) == "default"
    records.add_to_cache([make_record(winner="ours 2")])
    clear_record_table(monkeypatch)
    assert gpu(make_record()) == 2


def count_graphs(function):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(function, backend=count, fullgraph=True, dynamic=True), graphs


def test_compiled_model_guards_on_the_token_bucket_only():
    case = cases.Case("attention", "inference", (("heads", 2), ("head_dim", 16)), 64, 64, "float32")
    records.adopt([make_record(case, gpu="interpreter", winner="ours 0")])
    torch.compiler.reset()
    compiled, graphs = count_graphs(lambda q: ops.attention(q, q, q))
    with fastvit.backend("triton"):
        for tokens, expected in ((5, 1), (9, 1), (20, 1), (31, 1), (40, 2), (35, 2)):
            query = torch.randn(2, tokens, 2, 16)
            torch.testing.assert_close(compiled(query), reference.attention(query, query, query))
            assert len(graphs) == expected, tokens


# ---------------------------------------------------------------------------------------------------------------------
# Invalidation
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
def compute_hash(tmp_path, monkeypatch):
    """Return a function that hashes kernel files with the given content."""
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


def test_hash_depends_on_code_and_tiles_but_not_on_comments(compute_hash, monkeypatch):
    before = compute_hash()
    for same in (
        SOURCE.replace("What it does.", "Other words."),
        SOURCE.replace("a comment", "another comment"),
        SOURCE.replace('"""A kernel."""', ""),
        SOURCE + "\n\n",
    ):
        assert compute_hash(same) == before
    for other in (
        SOURCE.replace("x_ptr + ROWS", "x_ptr - ROWS"),
        SOURCE.replace("1.44", "1.45"),
        SOURCE.replace("_forward(", "_first("),
        SOURCE.replace("def _launch():", "def _launch():\n    check()"),
    ):
        assert compute_hash(other) != before
    assert compute_hash(helper="@triton.jit\ndef _add(a):\n    return a + 2\n") != before
    monkeypatch.setattr(tiles, "TABLE", tuple(rule for rule in tiles.TABLE if rule.operation != "attention_forward"))
    assert compute_hash() == before
    monkeypatch.setattr(tiles, "TABLE", tuple(rule for rule in tiles.TABLE if rule.operation != "layer_norm_forward"))
    assert compute_hash() != before


def test_every_kernel_module_has_a_hash():
    hashes = {module: records.hash_kernel(module) for module in ops.KERNEL_MODULES.values()}
    assert all(len(value) == 16 for value in hashes.values())
    assert hashes["attention"] != hashes["layer_norm"]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_record_round_trips_through_a_file(tmp_path):
    record = make_record(candidates=(Timing("pytorch", 1.5), Timing("ours 0", None, "wrong: ...")))
    records.export(tmp_path / "folder" / "sent.json", [record])
    assert list(records.read(tmp_path / "folder" / "sent.json").values()) == [record]


@pytest.mark.parametrize(
    "content",
    [b"{", b'{"a": 1}', b"\xff\xfe", b"", b"[" * 100_000],
    ids=["cut off", "no list", "not text", "empty", "nested"],
)
def test_corrupt_file_warns_and_is_rewritten(content):
    records.get_cache_path().parent.mkdir(parents=True)
    records.get_cache_path().write_bytes(content)
    with pytest.warns(UserWarning, match=r"records\.json does not hold tuning records"):
        assert records.get_table() == {}
    assert json.loads(records.get_cache_path().read_text()) == []


def test_malformed_records_are_skipped():
    good = make_record()
    records.add_to_cache([good])
    entries = json.loads(records.get_cache_path().read_text())
    fail = [{"operation": "layer_norm"}, 3, {**entries[0], "sizes": [["a", []]]}]
    winners = ("ours x", "ours 99", "ours -1", "pytorch foo", "nobody", "")
    fail += [{**entries[0], "winner": winner} for winner in winners]
    records.get_cache_path().write_text(json.dumps([*fail, *entries]))
    assert list(records.get_table()[GPU].values()) == [good]


def test_records_that_cannot_be_written_warn_and_are_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "file" / "cache"))  # no folder can be made there
    with pytest.warns(UserWarning, match="tuning records are not saved"):
        (record,) = tune(Norm(), batch_size=2, timer=make_timer(ours_0=1.0), progress=False)
    assert records.find(record.case, "interpreter", "layer_norm") == record


@pytest.mark.filterwarnings("error")
def test_concurrent_writes_lose_no_records():
    """No record of any process is lost, and a reader always sees a complete file."""
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
# Printed output
# ---------------------------------------------------------------------------------------------------------------------


def test_printed_table_lists_times_and_winners():
    from fastvit.cli import tune as command

    lost = make_record(winner="pytorch", candidates=(Timing("pytorch", 0.25), Timing("ours 0", None, "wrong")))
    lines = command.format_table([make_record(), lost]).splitlines()
    assert lines[0].split() == ["operation", "sizes", "rows", "tokens", "PyTorch", "ms", "ours", "ms", "winner"]
    assert lines[1].split() == ["layer_norm", "hidden", "16", "<=", "64", "2.000", "1.000", "ours", "1"]
    assert lines[2].split() == ["layer_norm", "hidden", "16", "<=", "64", "0.250", "-", "pytorch"]


def test_model_size_loads_without_weights():
    from fastvit.cli import tune as command

    model = command.load_model("micro", 32)
    assert (model.config.hidden_size, model.config.image_size) == (96, 32)
    with pytest.raises(fastvit.InputError, match="found no folder 'huge'"):
        command.load_model("huge", None)


def test_info_lists_the_records_of_this_gpu(monkeypatch):
    monkeypatch.setattr(records, "get_gpu_name", lambda *device: GPU)
    assert "no records of measurements on this GPU" in info.list_measurements(torch.device("cuda", 0))[0]
    records.adopt([make_record(), make_record(gpu="another GPU")])
    lines = info.list_measurements(torch.device("cuda", 0))
    assert lines == ["measured on this GPU:", "  layer_norm, inference, float32, hidden 16, rows up to 64: ours 1"]


# ---------------------------------------------------------------------------------------------------------------------
# Tuning in fine-tuning and in the predictor
# ---------------------------------------------------------------------------------------------------------------------


def test_fine_tuning_tunes_training_and_evaluation(monkeypatch, capsys):
    from fastvit.train import finetune
    from fastvit.train.options import parse_options

    requested = []
    monkeypatch.setattr(
        finetune, "tune_at_start", lambda *args, **options: requested.append((args, options)) or "measured"
    )
    sizes = types.SimpleNamespace(per_device_train_batch_size=16, per_device_eval_batch_size=32)
    finetune.tune_operations(types.SimpleNamespace(model="model", args=sizes), "bf16")
    assert requested == [(("model", [(16, True), (32, False)], torch.bfloat16), {"is_distributed": True})]
    assert capsys.readouterr().out == "measured (--no-tune skips this)\n"
    assert parse_options(["--dataset", "generated"]).tune
    assert not parse_options(["--dataset", "generated", "--no-tune"]).tune


def test_predictor_tunes_a_single_image_and_its_largest_batch(monkeypatch, caplog):
    from transformers import ViTImageProcessorPil

    from fastvit.serve import predictor

    requested = []
    monkeypatch.setattr(predictor, "tune_at_start", lambda model, sizes: requested.append(sizes) or "measured")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    with caplog.at_level(logging.INFO, "fastvit"):
        fastvit.Predictor(make_model(), max_batch=8, image_processor=processor).close()
    assert requested == [[(8, False), (1, False)]]
    assert "measured (tune=False skips this)" in caplog.text
    fastvit.Predictor(make_model(), max_batch=1, image_processor=processor, tune=False).close()
    assert len(requested) == 1
