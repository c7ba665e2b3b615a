"""The benchmark harness: what it times, what it refuses to time, and what is made of the results."""

import copy
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit import cli
from fastvit.benchmarks import bench_model, cases, ceilings, command, harness, memory, plots, storage, timing
from fastvit.benchmarks.cases import Cost, Operation, Shape
from fastvit.benchmarks.comparisons import against_targets, comparisons
from fastvit.benchmarks.harness import Settings
from fastvit.benchmarks.page import render_page
from fastvit.benchmarks.readme import readme_section
from fastvit.benchmarks.tables import render_table
from fastvit.benchmarks.timing import Step
from fastvit.errors import InputError
from fastvit.files import write_text
from fastvit.report import info

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MICRO = Shape("micro", 32, 1)
OPERATIONS = [
    operation
    for module in (*command.KERNELS, "bench_model", "bench_predictor")
    for operation in importlib.import_module(f"fastvit.benchmarks.{module}").OPERATIONS
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Toy sizes gain nothing from more, and threads that wait for each other on a busy machine lose a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# What is right
# ---------------------------------------------------------------------------------------------------------------------


def square(x):
    return x * x


@pytest.fixture
def operation():
    """x * x, and everything that can go wrong with it."""
    operation = Operation(
        "square",
        setup=lambda shape, dtype, device: {
            "x": torch.randn(shape.rows, shape.hidden, dtype=dtype, device=device).requires_grad_()
        },
        definition=square,
        cost=lambda shape, itemsize: {"forward": Cost(10, 100), "backward": Cost(20, 300)},
    )
    operation.provider("PyTorch")(square)
    return operation


def outcomes(operation, dtype=torch.float32, **settings):
    """(status, reason) of the first pass of each provider, and all records."""
    records = list(harness.run_case(operation, MICRO, dtype, Settings(DEVICE, quick=True, **settings)))
    first = {record["provider"]: (record["status"], record["reason"]) for record in reversed(records)}
    return first, records


class SquareWithHalfTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


def with_one_bad_row(x):
    y = x * x
    return torch.cat([y[:-1], y[-1:] * 1.001])


def right_only_with_gradients(x):
    return x * x if torch.is_grad_enabled() else x * x * 1.01


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: x * x * 1.001, "output 0"),
        (lambda x: torch.full_like(x, float("nan")) * x, "output 0"),
        (lambda x: (x * x).masked_fill(x == x.max(), float("nan")), "output 0"),
        (with_one_bad_row, "output 0"),
        (lambda x: SquareWithHalfTheGradient.apply(x), "gradient 0"),  # PyTorch 2.11: apply takes no names
        (right_only_with_gradients, "output 0 of inference"),
    ],
    ids=["scale", "nan", "one nan", "row", "gradient", "inference"],
)
def test_wrong_provider_is_reported_and_not_timed(operation, function, what):
    operation.provider("wrong")(function)
    found, records = outcomes(operation)
    status, reason = found["wrong"]
    assert status == "wrong" and reason.startswith(what), reason
    assert not any("ms" in record for record in records if record["provider"] == "wrong")
    assert all("ms" in record for record in records if record["provider"] == "PyTorch")


def test_wrong_baseline_is_found_by_the_definition(operation):
    operation.provider("PyTorch")(lambda x: x * x * 1.1)
    operation.provider("right")(square)
    found, _ = outcomes(operation)
    assert found["PyTorch"][0] == "wrong" and found["right"][0] == "timed"


def test_who_cannot_run_is_listed_with_the_reason(operation):
    def raises(x):
        raise RuntimeError("no such\nkernel")

    operation.provider("raises")(raises)
    operation.provider("absent", needs=("no_such_package",))(square)
    operation.provider("elsewhere", devices=("tpu",))(square)
    operation.provider("for few", max_batch=0)(square)
    operation.compiled("PyTorch")
    found, _ = outcomes(operation)
    assert found.pop("PyTorch") == ("timed", None)
    assert found["raises"] == ("failed", "RuntimeError: no such kernel")
    assert found["absent"] == ("missing", "the package no_such_package is not installed")
    assert found["elsewhere"] == ("missing", "it runs on tpu only")
    assert found["for few"] == ("left out", "it is for batches up to 0")
    assert found["PyTorch compiled"][0] == found["PyTorch max-autotune"][0] == "left out"


def test_nothing_is_begun_after_the_deadline(operation):
    found, _ = outcomes(operation, deadline=0.0)
    assert found["PyTorch"] == ("left out", "the time budget was spent before its turn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_our_operations_are_right_at_toy_size(dtype):
    for operation in OPERATIONS[:-2]:  # the model and the predictor are in their own tests
        for shape in operation.shapes(DEVICE, quick=True):
            records = list(harness.run_case(operation, shape, dtype, Settings(DEVICE, quick=True, memory_only=True)))
            assert all(record["status"] != "wrong" for record in records), records
            assert any(record["ours"] and record["status"] == "measured" for record in records), records


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("name", ["layer_norm", "patch_embed"])
def test_kernels_run_in_the_harness(name):
    (operation,) = (operation for operation in OPERATIONS if operation.name == name)
    timed = name == "layer_norm"  # the other takes seconds a call where it is interpreted
    settings = Settings(DEVICE, quick=True, providers="fastvit", memory_only=not timed)
    with fastvit.backend("triton"):
        records = list(harness.run_case(operation, MICRO, torch.float32, settings))
    ours = "fastvit" if DEVICE.type == "cuda" else "fastvit interpreted"
    assert {record["provider"] for record in records} == {ours, "PyTorch"}
    assert all(record["status"] == ("timed" if timed else "measured") for record in records), records
    assert not timed or all(record["ms"]["median"] > 0 for record in records)


def test_plain_pytorch_is_not_called_a_kernel():
    with fastvit.backend("reference"):
        assert cases.who_computes("layer_norm", DEVICE, torch.float32) == "fastvit reference"
    assert cases.who_computes("layer_norm", torch.device("cpu"), torch.float32) == "fastvit reference"
    assert cases.who_computes("no such kernel", DEVICE, torch.float32) == "fastvit reference"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_providers_take_turns_there_and_back():
    calls = []
    steps = {name: Step(lambda _, name=name: calls.append(name)) for name in "ab"}
    samples = timing.measure(steps, torch.device("cpu"), seconds=0.0, min_rounds=4)
    runs = re.findall(r"a+|b+", "".join(calls)[4:])  # after two calls of warm-up each
    assert [run[0] for run in runs] == ["a", "b", "a", "b", "a"]  # a b, b a, a b, b a
    of_a, of_b = len(runs[0]), len(runs[1]) // 2
    assert [len(run) for run in runs] == [of_a, 2 * of_b, 2 * of_a, 2 * of_b, of_a]
    assert (len(samples["a"].milliseconds), len(samples["b"].milliseconds)) == (4 * of_a, 4 * of_b)


def test_preparation_is_not_timed():
    import time

    step = Step(lambda _: None, lambda: time.sleep(0.02))
    assert timing.median_ms(step, torch.device("cpu"), seconds=0.0, min_rounds=3) < 10


def test_who_fails_while_timed_does_not_stop_the_others():
    def fails(_):
        raise RuntimeError("out of memory")

    samples = timing.measure({"bad": Step(fails), "good": Step(lambda _: None)}, DEVICE, seconds=0.0, min_rounds=3)
    assert isinstance(samples["bad"], RuntimeError) and len(samples["good"].milliseconds) >= 3


def test_clock_of_a_gpu_flushes_pauses_and_times_the_call_alone(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 1.5

    class Flusher:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("pause"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("wait"))
    monkeypatch.setattr(timing, "cache_flusher", lambda device: Flusher())
    step = Step(lambda prepared: log.append(f"run {prepared}"), lambda: log.append("prepare") or "it")
    gpu = torch.device("cuda")
    assert timing.time_calls(step, 2, gpu, 1e-3).milliseconds == [1.5, 1.5]
    call = ["prepare", "flush", "pause", "event", "run it", "event"]
    assert log == [*call, *call, "wait"]
    log.clear()
    timing.time_calls(step, 1, gpu, None)  # where the host's time counts the device is idle before
    assert log == ["prepare", "flush", "wait", "event", "run it", "event", "wait"]
    samples = timing.measure({"it": step}, gpu, seconds=0.0, min_rounds=3)["it"]
    assert set(samples.milliseconds) == {1.5} and len(samples.host_microseconds) == len(samples.milliseconds)


def test_quantiles_and_speeds():
    samples = [float(value) for value in range(1, 102)]  # 1 to 101 ms
    ms = timing.quantiles(samples)
    assert (ms["min"], ms["q25"], ms["median"], ms["q75"], ms["max"], ms["samples"]) == (1, 26, 51, 76, 101, 101)
    measured = {"copy_gb_per_s": 100.0, "matmul_tflop_per_s": {"float32": 1.0}}
    memory_bound = ceilings.speeds(timing.Samples([10.0], [1.0]), Cost(1e9, 5e8), torch.float32, DEVICE, measured, None)
    assert memory_bound["gb_per_s"] == pytest.approx(50) and memory_bound["tflop_per_s"] == pytest.approx(0.1)
    assert memory_bound["floor_ms"] == pytest.approx(5) and memory_bound["of_floor"] == pytest.approx(0.5)
    compute_bound = ceilings.speeds(timing.Samples([10.0], [1.0]), Cost(8e9, 1e6), torch.float32, DEVICE, measured, 4)
    assert compute_bound["floor_ms"] == pytest.approx(8) and compute_bound["images_per_s"] == pytest.approx(400)


def test_bytes_kept_for_backward_leave_out_inputs():
    x = torch.randn(100, requires_grad=True)
    assert memory.bytes_kept(lambda: (x * x).sum(), [x]) == 0  # x alone
    assert memory.bytes_kept(lambda: x.exp().sum(), [x]) == 400  # its output
    assert memory.bytes_kept(lambda: x.exp().sin().sum(), [x]) == 400  # the same tensor for both
    assert memory.bytes_kept(lambda: x.exp().exp().sum(), [x]) == 800


@pytest.mark.parametrize("name", ["attention", "layer_norm_gelu", "patch_embed"])
def test_cost_counts_the_arithmetic_of_the_definition(name):
    (operation,) = (operation for operation in OPERATIONS if operation.name == name)
    for shape in operation.shapes(torch.device("cpu"), quick=True):
        inputs = operation.setup(shape, torch.float32, torch.device("cpu"))
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),  # the counter does not know oneDNN's product
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            operation.definition(**inputs)
        assert operation.costs(shape, torch.float32)["forward"].flops == counter.get_total_flops()


def test_cost_of_the_model_counts_its_arithmetic():
    shape = Shape("micro", 64, 2)
    model = bench_model.transformers.ViTForImageClassification(bench_model.vit_config(shape))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert bench_model.forward_flops(shape) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_bytes_of_the_memory_bound_operations():
    shape, row_set = Shape("base", 224, 256), 256 * 197 * 768 * 2
    costs = {operation.name: operation.costs(shape, torch.bfloat16) for operation in OPERATIONS}
    assert costs["layer_norm"]["forward"].bytes == 2 * row_set
    assert costs["add_layer_norm"]["forward"].bytes == costs["add_layer_norm"]["backward"].bytes == 4 * row_set
    assert costs["attention"]["forward"].bytes == 4 * row_set
    assert costs["attention"]["forward + backward"].bytes == 12 * row_set


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    argv = ["benchmark", "kernels", "--quick", "--only", "^(layer_norm|attention.*packed)", "--out", str(folder)]
    assert cli.main(argv) == 0
    return folder


def test_results_say_what_was_measured_where(results_folder):
    assert {path.name for path in results_folder.iterdir()} >= {
        f"{name}.{suffix}" for name in ("layer_norm", "attention", "layer_norm_gelu") for suffix in ("json", "csv")
    }
    assert not list(results_folder.glob("*.part")) + list(results_folder.glob(".*"))
    result = json.loads((results_folder / "layer_norm.json").read_text())
    assert result["schema"] == storage.SCHEMA and result["not_begun"] == result["failed_cases"] == []
    about = result["environment"]
    assert (about["device"] and about["packages"]["torch"] == torch.__version__.partition("+")[0]) or about["packages"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", about["date"])
    assert {"commit", "platform", "python", "settings", "threads"} <= about.keys()
    assert result["ceilings"]["copy_gb_per_s"] > 0 and result["ceilings"]["matmul_tflop_per_s"]
    passes = set()
    for record in result["records"]:
        assert record["status"] in ("timed", "wrong", "failed", "missing", "left out", "measured")
        assert (record["reason"] is None) == (record["status"] == "timed"), record
        if record["status"] == "timed":
            passes.add(record["pass"])
            ms = record["ms"]
            assert 0 < ms["min"] <= ms["p05"] <= ms["q25"] <= ms["median"] <= ms["q75"] <= ms["p95"] <= ms["max"]
            assert record["gb_per_s"] == pytest.approx(record["bytes"] / ms["median"] / 1e6)
    assert passes == set(cases.PASSES)
    rows = (results_folder / "layer_norm.csv").read_text().splitlines()
    assert len(rows) == 1 + len(result["records"]) and rows[0].startswith("device,date,commit,operation,shape,dtype")


def test_stopped_run_leaves_what_it_has_measured(tmp_path, operation):
    def case(settings, tick):
        return harness.run_case(operation, MICRO, torch.float32, settings, tick)

    def stopped(settings, tick):
        raise KeyboardInterrupt

    tasks = [command.Task("square", "square one", 0, case), command.Task("square", "square two", 0, stopped)]
    options = command.build_parser().parse_args(["kernels", "--quick"])
    with pytest.raises(KeyboardInterrupt):
        command.run_tasks(tasks, Settings(DEVICE, quick=True), options, lambda result: storage.write(result, tmp_path))
    (result,) = storage.load([tmp_path])
    assert len(result["records"]) == 3 and result["not_begun"] == ["square two"]


def test_case_that_cannot_be_set_up_is_reported_and_the_rest_goes_on(operation):
    def case(settings, tick):
        return harness.run_case(operation, MICRO, torch.float32, settings, tick)

    def too_large(settings, tick):
        raise MemoryError("too large")

    tasks = [command.Task("square", "square one", 0, too_large), command.Task("square", "square two", 0, case)]
    options = command.build_parser().parse_args(["kernels", "--quick"])
    results = command.run_tasks(tasks, Settings(DEVICE, quick=True), options, lambda result: None)
    assert results["square"]["failed_cases"] == [{"case": "square one", "reason": "MemoryError: too large"}]
    assert len(results["square"]["records"]) == 3
    assert "too large" in render_table(list(results.values()))


def test_wrong_result_of_ours_is_exit_code_1(tmp_path, monkeypatch, capsys):
    def forgets_eps(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, 1e-2)

    ours = cases.Provider("fastvit", forgets_eps, kernel="layer_norm")
    monkeypatch.setitem(OPERATIONS[0].providers, "fastvit", ours)
    argv = ["benchmark", "kernels", "--quick", "--only", "^layer_norm ", "--out", str(tmp_path)]
    assert cli.main(argv) == 1
    assert "float32: wrong: " in capsys.readouterr().out


def test_list_names_every_operation_and_runs_nothing(capsys):
    assert cli.main(["benchmark", "all", "--list", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} == {operation.name for operation in OPERATIONS} | {"coldstart", "host"}
    assert cli.main(["benchmark", "all", "--list", "--device", "cuda"]) == 0  # needs no GPU
    on_gpu = capsys.readouterr().out.splitlines()
    assert "attention ViT-B/16 224, batch 256, packed qkv bfloat16" in on_gpu[: len(on_gpu) // 2]
    files = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert files == {*command.KERNELS, *command.MODELS, "bench_predictor", "bench_coldstart", "bench_host"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["kernels", "--only", "no such case"], "--only"),
        (["kernels", "--only", "("], "--only"),
        (["kernels", "--providers", "("], "--providers"),
        (["report", "no-such-folder"], "no-such-folder"),
        (["compare", "a", "b", "--threshold", "-1"], "--threshold"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(["benchmark", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_cold_start_that_fails_is_reported(monkeypatch):
    coldstart = importlib.import_module("fastvit.benchmarks.bench_coldstart")

    def start_once(provider, *_):
        if provider.startswith("transformers"):
            raise RuntimeError("no")
        return dict.fromkeys(coldstart.PHASES, 0.5)

    monkeypatch.setattr(coldstart, "start_once", start_once)
    records = list(coldstart.run(Settings(DEVICE, quick=True), torch.float32))
    assert len(records) == 4 * 2 * len(coldstart.PHASES)
    assert all(one["ms"]["median"] == 500 for one in records if one["ours"])
    assert all(one["reason"] == "RuntimeError: no" and "ms" not in one for one in records if not one["ours"])
    late = list(coldstart.run(Settings(DEVICE, quick=True, deadline=0.0), torch.float32))
    assert {one["status"] for one in late} == {"left out"}


@pytest.mark.parametrize("provider", ["fastvit", "fastvit Predictor"])
def test_cold_start_runs_in_a_process_of_its_own(provider, tmp_path):
    coldstart = importlib.import_module("fastvit.benchmarks.bench_coldstart")
    coldstart.save_for_serving(MICRO, tmp_path)
    took = coldstart.start_once(provider, MICRO, "float32", "cpu", tmp_path, tmp_path)
    assert set(took) == {"import", "make the model", "first prediction", "all"}
    assert took["all"] == pytest.approx(sum(took.values()) - took["all"])


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------


def record(provider="fastvit", median=1.0, spread=0.01, **fields):
    quartiles = {"q25": median * (1 - spread), "median": median, "q75": median * (1 + spread)}
    ms = {
        "min": 0.9 * median,
        "p05": 0.9 * median,
        **quartiles,
        "p95": 1.1 * median,
        "max": 1.2 * median,
        "samples": 50,
    }
    return {
        "operation": "layer_norm", "shape": "ViT-B/16 224, batch 256", "headline": True, "dtype": "bfloat16",
        "pass": "forward", "provider": provider, "registered": provider.removesuffix(" reference"),
        "ours": provider.startswith("fastvit"), "status": "timed", "reason": None, "ms": ms, "of_floor": 0.5,
        "bytes": 1e8, "flops": 1e9, "gb_per_s": 100.0 / median, "tflop_per_s": 1.0 / median, "peak_bytes": 1000,
        "kept_bytes": 100,
    } | fields  # fmt: skip


def result(*records, device_type="cuda", **options):
    return {
        "schema": storage.SCHEMA,
        "operation": "layer_norm",
        "environment": {
            "device": "Some <GPU>", "device_type": device_type, "date": "2026-01-02T03:04:05+00:00", "commit": "abc",
            "commit_is_all": True, "platform": "Linux", "python": "3.12", "settings": {"FASTVIT_BACKEND": "auto"},
            "packages": {"torch": "2.11", "triton": "3.6"}, "driver": "1",
        },
        "ceilings": {"copy_gb_per_s": 3000.0, "matmul_tflop_per_s": {"bfloat16": 700.0}},
        "options": {"quick": False, "interpreted": False, "memory_only": False} | options,
        "not_begun": [],
        "failed_cases": [],
        "records": list(records),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("after", "code", "says"),
    [
        (record(), 0, "0 worse, 0 better of 1"),
        (record(median=1.04), 0, "0 worse"),  # within the threshold
        (record(median=1.10), 1, "1.1 ms (+10.0%)"),
        (record(median=1.10, spread=0.2), 0, "0 worse"),  # within noise
        (record(median=0.80), 0, "1 better"),
        (record(status="wrong", reason="off"), 1, "wrong (off)"),
        (record(status="failed", reason="raised"), 1, "failed (raised)"),
        (record(peak_bytes=2000), 1, "peak bytes 1e+03 B -> 1.95 KiB"),
        (record(kept_bytes=200), 1, "kept bytes"),
        (record("fastvit reference", median=2.0), 1, "fastvit -> fastvit reference"),  # the kernel is gone
    ],
)
def test_compare_exits_with_1_beyond_threshold_and_noise(after, code, says, tmp_path, capsys):
    storage.write(result(record(), record("PyTorch")), tmp_path / "a")
    storage.write(result(after, record("PyTorch", median=3.0)), tmp_path / "b")
    assert cli.main(["benchmark", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == code
    out = capsys.readouterr().out
    assert says in out and "others, whose code is the same, take 3.000x" in out


def test_compare_takes_a_threshold_and_names_what_is_gone(tmp_path, capsys):
    storage.write(result(record(), record(shape="another")), tmp_path / "a")
    storage.write(result(record(median=1.10)), tmp_path / "b")
    argv = ["benchmark", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--threshold", "0.2"]
    assert cli.main(argv) == 0
    assert "not measured again:\n  layer_norm | another" in capsys.readouterr().out


def test_compare_refuses_to_compare_nothing(tmp_path, capsys):
    storage.write(result(record(), record("PyTorch")), tmp_path / "a")
    storage.write(result(record("PyTorch")), tmp_path / "b")
    assert cli.main(["benchmark", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "no case in common" in capsys.readouterr().err


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")  # half a character
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["results.json"]


def test_results_of_another_schema_are_refused(tmp_path):
    storage.write(result(record()) | {"schema": 99}, tmp_path)
    with pytest.raises(InputError, match="schema 1, got 99"):
        storage.load([tmp_path])


# ---------------------------------------------------------------------------------------------------------------------
# The README and the page
# ---------------------------------------------------------------------------------------------------------------------


def test_readme_agrees_with_the_results(capsys):
    assert command.checkout() == ROOT
    assert cli.main(["benchmark", "readme", "--check"]) == 0, "run: fastvit benchmark readme"


def test_readme_check_fails_when_results_change(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    monkeypatch.setattr(command, "checkout", lambda: tmp_path)
    storage.write(result(record(median=1.0), record("PyTorch", median=2.0)), tmp_path / "benchmarks/results/some-gpu")
    assert cli.main(["benchmark", "readme", "--check"]) == 1
    assert cli.main(["benchmark", "readme"]) == 0
    assert cli.main(["benchmark", "readme", "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    row = "| layer_norm, ViT-B/16 224, batch 256, bfloat16 | forward | 1 | 2 (PyTorch) | 2.00x | 50 % |  |"
    assert row in text and "No results of a GPU" not in text
    edited = text.replace("2.00x", "3.00x")
    (tmp_path / "README.md").write_text(edited)
    assert cli.main(["benchmark", "readme", "--check"]) == 1


def test_readme_says_where_no_gpu_was_and_leaves_out_toys(tmp_path):
    assert readme_section(tmp_path / "nothing").startswith("No results of a GPU have been recorded yet")
    storage.write(result(record(), device_type="cpu"), tmp_path / "cpu")
    storage.write(result(record(median=7.0), quick=True), tmp_path / "quick")
    storage.write(result(record(median=7.0), interpreted=True), tmp_path / "interpreted")
    section = readme_section(tmp_path)
    assert section.startswith("No results of a GPU have been recorded yet")
    assert "| forward | 1 |" in section and "| 7 |" not in section


def test_page_needs_nothing_but_itself(results_folder, tmp_path):
    path = tmp_path / "page.html"
    assert cli.main(["benchmark", "report", str(results_folder), "--out", str(path)]) == 0
    page = path.read_text()
    assert not re.search(r"https?://|<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bhref=", page)
    assert page.count("<svg") == page.count("</svg>") == 1 and 'class="roof"' in page
    for result_ in storage.load([results_folder]):
        assert f"<h3>{result_['operation']}</h3>" in page
        for name in {one["provider"] for one in result_["records"]}:
            assert name in page


def test_page_shows_speed_ups_escapes_names_and_joins_folders(tmp_path):
    storage.write(result(record(median=1.0), record("PyTorch", median=0.5)), tmp_path / "a")
    storage.write(result(record(median=1.0), record("PyTorch", median=2.0)), tmp_path / "b")
    page = render_page(storage.load([tmp_path / "a", tmp_path / "b"]))
    assert '<td class="number slower">0.50x</td>' in page and '<td class="number">2.00x</td>' in page
    assert "Some &lt;GPU&gt;" in page and "<GPU>" not in page
    assert page.count("<h2>") == 2


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ({"speed_up": 1.5, "of_floor": 0.9}, "1.5x: met, 90 % of floor: missed"),
        ({"speed_up": 2.5}, "2.5x: missed"),
        ({"memory": 0.75}, "0.75x the memory: met"),
        ({"memory": 0.25}, "0.25x the memory: missed"),
        ({"over PyTorch": 2.0}, "2x PyTorch: met"),
        ({"over PyTorch": 2.1}, "2.1x PyTorch: missed"),
        ({"over timm": 1.0}, "1x timm: not measured"),
        ({"images_per_s": 12000}, "12,000 images/s: missed"),
    ],
)
def test_targets_are_named_met_or_missed(targets, says):
    records = [record(targets=targets, peak_bytes=500, images_per_s=100.0)]
    records.append(record("PyTorch", median=2.0, targets=targets))
    (comparison,) = comparisons([result(*records)])
    assert against_targets(comparison) == says
    (comparison,) = comparisons([result(records[0] | {"status": "wrong", "ms": None})])
    assert "met" not in against_targets(comparison) and "not measured" in against_targets(comparison)


def test_roofline_places_points_under_the_roof():
    slow, fast = record(), record("PyTorch", tflop_per_s=30.0)  # 10 FLOP a byte: the roof is 30 TFLOP/s
    svg = plots.draw_roofline([result(slow, fast)], "bfloat16")
    heights = {kind: float(y) for kind, y in re.findall(r'<circle class="(\w+)"[^>]* cy="([\d.]+)"', svg)}
    x, y = re.search(r'class="other" cx="([\d.]+)" cy="([\d.]+)"', svg).groups()
    roof = re.search(r'class="roof" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)', svg)
    x0, y0, x1, y1 = map(float, roof.groups())
    assert heights["ours"] > heights["other"]  # lower in the picture
    assert float(y) == pytest.approx(y0 + (float(x) - x0) / (x1 - x0) * (y1 - y0), abs=0.2)
    assert plots.draw_roofline([result(slow)], "float32") == ""


def test_plots_are_drawn_where_matplotlib_is(results_folder, tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        assert plots.draw_bars(storage.load([results_folder]), tmp_path) == "no PNG plots: matplotlib is not installed"
        assert not list(tmp_path.iterdir())
    else:
        assert plots.draw_bars(storage.load([results_folder]), tmp_path) is None
        assert {path.name for path in tmp_path.iterdir()} == {
            f"{path.stem}.png" for path in results_folder.glob("*.json")
        }


def test_memory_alone_is_held_against_who_needs_least():
    def measured(provider, count):
        return record(provider, status="measured", ms=None, peak_bytes=count)

    records = [measured("fastvit", 512), measured("PyTorch", 2048), measured("PyTorch flash", 1024)]
    text = render_table([result(*records, memory_only=True)])
    assert "512 B : 1 KiB" in text and "PyTorch flash" in text


def test_processors_of_one_name_are_told_apart(monkeypatch):
    lines = "cpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n"
    monkeypatch.setattr(Path, "read_text", lambda self: lines.format(25, 17) + "\n" + lines.format(25, 18))
    assert info.read_processor_name() == "AMD EPYC (family 25, model 17)"
    monkeypatch.setattr(Path, "read_text", lambda self: "model name: Neoverse\n")
    assert info.read_processor_name() == "Neoverse"


def test_best_of_ours_is_held_against_the_best_of_the_others():
    records = [record(median=2.0), record("fastvit compiled", median=1.5), record("PyTorch", median=4.0)]
    records += [record("Liger-Kernel", median=3.0), record("flash-attn", status="missing", reason="no", ms=None)]
    (comparison,) = comparisons([result(*copy.deepcopy(records))])
    assert (comparison.ours["provider"], comparison.rival["provider"]) == ("fastvit compiled", "Liger-Kernel")
    assert comparison.speed_up == pytest.approx(2.0)
    assert "flash-attn: missing: no" in render_table([result(*records)])


def test_the_host_is_measured_without_a_gpu(tmp_path, capsys):
    pytest.importorskip("triton")
    assert cli.main(["benchmark", "host", "--quick", "--out", str(tmp_path)]) == 0
    records = {
        (one["provider"], one["pass"]): one for one in json.loads((tmp_path / "host.json").read_text())["records"]
    }
    for provider in ("fastvit", "transformers"):
        times = [records[provider, name]["ms"]["median"] for name in ("inference", "forward and backward")]
        assert 0 < times[0] < times[1]
    assert records["timm", "inference"]["status"] == ("timed" if importlib.util.find_spec("timm") else "missing")


def test_a_host_measurement_that_fails_is_reported(monkeypatch):
    host = importlib.import_module("fastvit.benchmarks.bench_host")
    monkeypatch.setattr(host.sys, "executable", "/bin/false")
    records = list(host.run(Settings(DEVICE, quick=True)))
    assert {one["status"] for one in records} == {"failed"}
    assert {one["reason"] for one in records} == {"RuntimeError: the process ended"}
