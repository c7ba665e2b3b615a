"""The benchmark harness: what it times, what it refuses to time, and runs of the command."""

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
from fastvit.benchmarks import bench_model, cases, ceilings, command, harness, measure, records
from fastvit.benchmarks.cases import Cost, Operation, Shape
from fastvit.benchmarks.harness import Settings
from fastvit.benchmarks.measure import Step
from fastvit.benchmarks.report import print_table
from fastvit.report import info

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MICRO = Shape("micro", 32, 1)
KERNELS, MODELS = (
    [operation for name in names for operation in importlib.import_module(f"fastvit.benchmarks.{name}").OPERATIONS]
    for names in (command.KERNELS, (*command.MODELS, "bench_predictor"))
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Toy sizes gain nothing from more threads, and lose a lot on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------


def square(x):
    return x * x


@pytest.fixture
def operation():
    """x * x, on which tests register providers."""
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


def run_outcomes(operation, dtype=torch.float32, **settings):
    """Returns (status, reason) of the first pass of each provider, and all records."""
    found = harness.run_case(operation, MICRO, dtype, Settings(DEVICE, quick=True, **settings))
    first = {record["provider"]: (record["status"], record["reason"]) for record in reversed(found)}
    return first, found


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
        (lambda x: SquareWithHalfTheGradient.apply(x), "gradient 0"),  # PyTorch 2.11: apply accepts no keywords
        (right_only_with_gradients, "output 0 of inference"),
    ],
    ids=["scale", "nan", "one nan", "row", "gradient", "inference"],
)
def test_wrong_provider_is_reported_and_not_timed(operation, function, what):
    operation.provider("wrong")(function)
    found, all_records = run_outcomes(operation)
    status, reason = found["wrong"]
    assert status == "wrong" and reason.startswith(what), reason
    assert not any("ms" in record for record in all_records if record["provider"] == "wrong")
    assert all("ms" in record for record in all_records if record["provider"] == "PyTorch")


def test_wrong_baseline_is_found_by_the_definition(operation):
    operation.provider("PyTorch")(lambda x: x * x * 1.1)
    operation.provider("right")(square)
    found, _ = run_outcomes(operation)
    assert found["PyTorch"][0] == "wrong" and found["right"][0] == "timed"


def test_providers_that_cannot_run_are_listed_with_the_reason(operation):
    def raises(x):
        raise RuntimeError("no such\nkernel")

    operation.provider("raises")(raises)
    operation.provider("absent", needs=("no_such_package",))(square)
    operation.provider("elsewhere", devices=("tpu",))(square)
    operation.provider("for few", max_batch=0)(square)
    operation.add_compiled("PyTorch")
    found, _ = run_outcomes(operation)
    assert found.pop("PyTorch") == ("timed", None)
    assert found["raises"] == ("failed", "RuntimeError: no such kernel")
    assert found["absent"] == ("missing", "package no_such_package is not installed")
    assert found["elsewhere"] == ("missing", "runs on tpu only")
    assert found["for few"] == ("left out", "for batches up to 0")
    assert found["PyTorch compiled"][0] == found["PyTorch max-autotune"][0] == "left out"


def test_nothing_starts_after_the_deadline(operation):
    found, _ = run_outcomes(operation, deadline=0.0)
    assert found["PyTorch"] == ("left out", "the time budget was spent before its turn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_our_operations_are_right_at_toy_size(dtype):
    for operation in KERNELS + (MODELS if dtype == torch.float32 else []):
        for shape in operation.list_shapes(DEVICE, quick=True):
            found = harness.run_case(operation, shape, dtype, Settings(DEVICE, suite="memory", quick=True))
            assert all(record["status"] not in ("wrong", "failed") for record in found), found
            can_run = operation.name != "predictor_int8" or importlib.util.find_spec("onnxscript")
            assert not can_run or any(record["ours"] and record["status"] == "measured" for record in found), found


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("name", ["layer_norm", "patch_embed"])
def test_kernels_run_in_the_harness(name):
    (operation,) = (operation for operation in KERNELS if operation.name == name)
    timed = name == "layer_norm"  # interpreted, the other needs seconds per call
    settings = Settings(DEVICE, suite="kernels" if timed else "memory", quick=True, providers="fastvit")
    with fastvit.backend("triton"):
        found = harness.run_case(operation, MICRO, torch.float32, settings)
    ours = "fastvit" if DEVICE.type == "cuda" else "fastvit interpreted"
    assert {record["provider"] for record in found} == {ours, "PyTorch"}
    assert all(record["status"] == ("timed" if timed else "measured") for record in found), found
    assert not timed or all(record["ms"]["median"] > 0 for record in found)


def test_plain_pytorch_is_not_labelled_as_a_kernel():
    with fastvit.backend("reference"):
        assert cases.label_ours("layer_norm", DEVICE, torch.float32) == "fastvit reference"
    assert cases.label_ours("layer_norm", torch.device("cpu"), torch.float32) == "fastvit reference"
    assert cases.label_ours("no such kernel", DEVICE, torch.float32) == "fastvit reference"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_providers_take_turns_there_and_back():
    calls = []
    steps = {name: Step(lambda _, name=name: calls.append(name)) for name in "ab"}
    samples = measure.measure_times(steps, torch.device("cpu"), seconds=0.0, min_rounds=4)
    runs = re.findall(r"a+|b+", "".join(calls)[4:])  # after two calls of warm-up each
    assert [run[0] for run in runs] == ["a", "b", "a", "b", "a"]  # a b, b a, a b, b a
    of_a, of_b = len(runs[0]), len(runs[1]) // 2
    assert [len(run) for run in runs] == [of_a, 2 * of_b, 2 * of_a, 2 * of_b, of_a]
    assert (len(samples["a"].milliseconds), len(samples["b"].milliseconds)) == (4 * of_a, 4 * of_b)


def test_preparation_is_not_timed():
    import time

    step = Step(lambda _: None, lambda: time.sleep(0.02))
    assert measure.median_ms(step, torch.device("cpu"), seconds=0.0, min_rounds=3) < 10


def test_a_failure_while_timing_does_not_stop_the_others():
    def fails(_):
        raise RuntimeError("out of memory")

    steps = {"bad": Step(fails), "good": Step(lambda _: None)}
    samples = measure.measure_times(steps, DEVICE, seconds=0.0, min_rounds=3)
    assert isinstance(samples["bad"], RuntimeError) and len(samples["good"].milliseconds) >= 3


def test_gpu_timing_flushes_the_cache_pauses_and_times_the_call_alone(monkeypatch):
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
    monkeypatch.setattr(measure, "get_cache_flusher", lambda device: Flusher())
    step = Step(lambda prepared: log.append(f"run {prepared}"), lambda: log.append("prepare") or "it")
    gpu = torch.device("cuda")
    assert measure.time_calls(step, 2, 1e-3, gpu).milliseconds == [1.5, 1.5]
    call = ["prepare", "flush", "pause", "event", "run it", "event"]
    assert log == [*call, *call, "wait"]
    log.clear()
    measure.time_calls(step, 1, None, gpu)  # host time counts: the device is idle before the call
    assert log == ["prepare", "flush", "wait", "event", "run it", "event", "wait"]
    samples = measure.measure_times({"it": step}, gpu, seconds=0.0, min_rounds=3)["it"]
    assert set(samples.milliseconds) == {1.5} and len(samples.host_microseconds) == len(samples.milliseconds)


def test_quantiles_and_speeds():
    samples = [float(value) for value in range(1, 102)]  # 1 to 101 ms
    ms = measure.compute_quantiles(samples)
    assert (ms["min"], ms["q25"], ms["median"], ms["q75"], ms["max"], ms["samples"]) == (1, 26, 51, 76, 101, 101)
    measured = {"copy_gb_per_s": 100.0, "matmul_tflop_per_s": {"float32": 1.0}}
    times = measure.Samples([10.0], [1.0])
    memory_bound = ceilings.compute_speeds(times, Cost(1e9, 5e8), torch.float32, DEVICE, measured, None)
    assert memory_bound["gb_per_s"] == pytest.approx(50) and memory_bound["tflop_per_s"] == pytest.approx(0.1)
    assert memory_bound["floor_ms"] == pytest.approx(5) and memory_bound["of_floor"] == pytest.approx(0.5)
    compute_bound = ceilings.compute_speeds(times, Cost(8e9, 1e6), torch.float32, DEVICE, measured, 4)
    assert compute_bound["floor_ms"] == pytest.approx(8) and compute_bound["images_per_s"] == pytest.approx(400)


def test_bytes_saved_for_backward_leave_out_inputs():
    x = torch.randn(100, requires_grad=True)
    assert measure.count_saved_bytes(lambda: (x * x).sum(), [x]) == 0  # x alone
    assert measure.count_saved_bytes(lambda: x.exp().sum(), [x]) == 400  # its output
    assert measure.count_saved_bytes(lambda: x.exp().sin().sum(), [x]) == 400  # the same tensor for both
    assert measure.count_saved_bytes(lambda: x.exp().exp().sum(), [x]) == 800


@pytest.mark.parametrize("name", ["attention", "layer_norm_gelu", "patch_embed"])
def test_cost_counts_the_flops_of_the_definition(name):
    (operation,) = (operation for operation in KERNELS if operation.name == name)
    for shape in operation.list_shapes(torch.device("cpu"), quick=True):
        inputs = operation.setup(shape, torch.float32, torch.device("cpu"))
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),  # the counter does not know oneDNN's matmul
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            operation.definition(**inputs)
        assert operation.compute_costs(shape, torch.float32)["forward"].flops == counter.get_total_flops()


def test_cost_of_the_model_counts_its_flops():
    shape = Shape("micro", 64, 2)
    model = bench_model.transformers.ViTForImageClassification(bench_model.make_config(shape))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert bench_model.count_forward_flops(shape) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_bytes_of_the_memory_bound_operations():
    shape, row_set = Shape("base", 224, 256), 256 * 197 * 768 * 2
    costs = {operation.name: operation.compute_costs(shape, torch.bfloat16) for operation in KERNELS}
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


def test_results_contain_records_and_environment(results_folder):
    assert {path.name for path in results_folder.iterdir()} >= {
        f"{name}.{suffix}" for name in ("layer_norm", "attention", "layer_norm_gelu") for suffix in ("json", "csv")
    }
    assert not list(results_folder.glob("*.part")) + list(results_folder.glob(".*"))
    result = json.loads((results_folder / "layer_norm.json").read_text())
    assert result["schema"] == records.SCHEMA and result["not_begun"] == result["failed_cases"] == []
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


def test_interrupted_run_keeps_its_results(tmp_path, operation):
    def interrupt(settings):
        raise KeyboardInterrupt

    tasks = [command.make_task(operation, MICRO, torch.float32), command.Task("square", "square two", 0, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        command.run_tasks(tasks, Settings(DEVICE, quick=True), lambda result: records.write_result(result, tmp_path))
    (result,) = records.load_results([tmp_path])
    assert len(result["records"]) == 3 and result["not_begun"] == ["square two"]


def test_case_that_cannot_be_set_up_is_reported_and_the_rest_runs(operation, capsys):
    def fail(settings):
        raise MemoryError("too large")

    tasks = [command.Task("square", "square one", 0, fail), command.make_task(operation, MICRO, torch.float32)]
    (result,) = command.run_tasks(tasks, Settings(DEVICE, quick=True), lambda result: None)
    assert result["failed_cases"] == [{"case": "square one", "reason": "MemoryError: too large"}]
    assert len(result["records"]) == 3
    print_table([result])
    assert "too large" in capsys.readouterr().out


def test_wrong_result_of_ours_is_exit_code_1(tmp_path, monkeypatch, capsys):
    def forgets_eps(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, 1e-2)

    ours = cases.Provider("fastvit", forgets_eps, kernel="layer_norm")
    monkeypatch.setitem(KERNELS[0].providers, "fastvit", ours)
    argv = ["benchmark", "kernels", "--quick", "--only", "^layer_norm ", "--out", str(tmp_path)]
    assert cli.main(argv) == 1
    assert "float32: wrong: " in capsys.readouterr().out


def test_list_names_every_operation_and_runs_nothing(capsys):
    assert cli.main(["benchmark", "all", "--list", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out.splitlines()
    names = {
        operation.name for operation in KERNELS + MODELS if operation.list_shapes(torch.device("cpu"), quick=False)
    }
    assert {line.split()[0] for line in listed} == names | {"coldstart", "host"}
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
    found = list(coldstart.run(torch.float32, Settings(DEVICE, quick=True)))
    assert len(found) == 4 * 2 * len(coldstart.PHASES)
    assert all(one["ms"]["median"] == 500 for one in found if one["ours"])
    assert all(one["reason"] == "RuntimeError: no" and "ms" not in one for one in found if not one["ours"])
    late = list(coldstart.run(torch.float32, Settings(DEVICE, quick=True, deadline=0.0)))
    assert {one["status"] for one in late} == {"left out"}


@pytest.mark.parametrize("provider", ["fastvit", "fastvit Predictor"])
def test_cold_start_runs_in_a_new_process(provider, tmp_path):
    coldstart = importlib.import_module("fastvit.benchmarks.bench_coldstart")
    coldstart.save_for_serving(MICRO, tmp_path)
    seconds = coldstart.start_once(provider, MICRO, "float32", "cpu", tmp_path, tmp_path)
    assert set(seconds) == {"import", "make the model", "first prediction", "all"}
    assert seconds["all"] == pytest.approx(sum(seconds.values()) - seconds["all"])


def test_processors_of_one_name_are_distinguished(monkeypatch):
    lines = "cpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n"
    monkeypatch.setattr(Path, "read_text", lambda self: lines.format(25, 17) + "\n" + lines.format(25, 18))
    assert info.read_processor_name() == "AMD EPYC (family 25, model 17)"
    monkeypatch.setattr(Path, "read_text", lambda self: "model name: Neoverse\n")
    assert info.read_processor_name() == "Neoverse"


def test_host_overhead_is_measured_without_a_gpu(tmp_path, capsys):
    pytest.importorskip("triton")
    assert cli.main(["benchmark", "host", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "host.json").read_text())
    found = {(one["provider"], one["pass"]): one for one in result["records"]}
    for provider in ("fastvit", "transformers"):
        times = [found[provider, name]["ms"]["median"] for name in ("inference", "forward and backward")]
        assert 0 < times[0] < times[1]
    has_timm = importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision")
    assert found["timm", "inference"]["status"] == ("timed" if has_timm else "missing")


def test_a_host_measurement_that_fails_is_reported(monkeypatch):
    host = importlib.import_module("fastvit.benchmarks.bench_host")
    monkeypatch.setattr(harness.sys, "executable", "/bin/false")
    found = list(host.run(torch.float32, Settings(DEVICE, quick=True)))
    assert {one["status"] for one in found} == {"failed"}
    assert {one["reason"] for one in found} == {"RuntimeError: exit code 1"}
