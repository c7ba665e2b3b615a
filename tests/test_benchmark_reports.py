"""Results of benchmarks: files, comparisons, the README's tables and the page."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest

from fastvit import cli
from fastvit.benchmarks import command
from fastvit.benchmarks.records import SCHEMA, compare_providers, format_targets, load_results, write_result
from fastvit.benchmarks.report import draw_bars, draw_roofline, print_table, render_page, render_tables
from fastvit.errors import InputError
from fastvit.files import write_text

ROOT = Path(__file__).parent.parent


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
        "schema": SCHEMA,
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
    ("after", "code", "text"),
    [
        (record(), 0, "0 worse, 0 better of 1"),
        (record(median=1.04), 0, "0 worse"),  # within the threshold
        (record(median=1.10), 1, "1.1 ms (+10.0%)"),
        (record(median=1.10, spread=0.2), 0, "0 worse"),  # within noise
        (record(median=0.80), 0, "1 better"),
        (record(status="wrong", reason="off"), 1, "wrong (off)"),
        (record(status="failed", reason="raised"), 1, "failed (raised)"),
        (record(peak_bytes=2000), 1, "peak memory 1000 B -> 1.953 KiB"),
        (record(kept_bytes=200), 1, "saved for backward"),
        (record("fastvit reference", median=2.0), 1, "fastvit -> fastvit reference"),  # the kernel is gone
    ],
)
def test_compare_exits_with_1_beyond_threshold_and_noise(after, code, text, tmp_path, capsys):
    write_result(result(record(), record("PyTorch")), tmp_path / "a")
    write_result(result(after, record("PyTorch", median=3.0)), tmp_path / "b")
    assert cli.main(["benchmark", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == code
    out = capsys.readouterr().out
    assert text in out and "others, whose code did not change: 3.000x" in out


def test_compare_accepts_a_threshold_and_lists_what_was_not_measured_again(tmp_path, capsys):
    write_result(result(record(), record(shape="another")), tmp_path / "a")
    write_result(result(record(median=1.10)), tmp_path / "b")
    argv = ["benchmark", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--threshold", "0.2"]
    assert cli.main(argv) == 0
    assert "not measured again:\n  layer_norm | another" in capsys.readouterr().out


def test_compare_fails_without_a_common_case(tmp_path, capsys):
    write_result(result(record(), record("PyTorch")), tmp_path / "a")
    write_result(result(record("PyTorch")), tmp_path / "b")
    assert cli.main(["benchmark", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "no case in common" in capsys.readouterr().err


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")  # half a character
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["results.json"]


def test_results_of_another_schema_are_refused(tmp_path):
    write_result(result(record()) | {"schema": 99}, tmp_path)
    with pytest.raises(InputError, match="schema 1, got 99"):
        load_results([tmp_path])


# ---------------------------------------------------------------------------------------------------------------------
# The README and the page
# ---------------------------------------------------------------------------------------------------------------------


def test_readme_agrees_with_the_results(capsys):
    assert command.find_root() == ROOT
    assert cli.main(["benchmark", "readme", "--check"]) == 0, "run: fastvit benchmark readme"


def test_readme_check_fails_when_results_change(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(command, "find_root", lambda: tmp_path)
    write_result(result(record(median=1.0), record("PyTorch", median=2.0)), tmp_path / "benchmarks/results/some-gpu")
    assert cli.main(["benchmark", "readme", "--check"]) == 1
    assert cli.main(["benchmark", "readme"]) == 0
    assert cli.main(["benchmark", "readme", "--check"]) == 0
    row = "| layer_norm, ViT-B/16 224, batch 256, bfloat16 | forward | 1 | 2 (PyTorch) | 2.00x | 50% |"
    for name, end in (("README.md", "\n"), ("docs/benchmarks.md", "  |\n")):
        text = (tmp_path / name).read_text()
        assert row + end in text and "Not measured on a GPU" not in text
        (tmp_path / name).write_text(text.replace("2.00x", "3.00x"))
        assert cli.main(["benchmark", "readme", "--check"]) == 1
        (tmp_path / name).write_text(text)


def test_tables_state_that_no_gpu_was_measured_and_leave_out_toys(tmp_path):
    assert render_tables(tmp_path / "nothing").startswith("Not measured on a GPU yet")
    write_result(result(record(), device_type="cpu"), tmp_path / "cpu")
    write_result(result(record(median=7.0), quick=True), tmp_path / "quick")
    write_result(result(record(median=7.0), interpreted=True), tmp_path / "interpreted")
    section = render_tables(tmp_path)
    assert section.startswith("Not measured on a GPU yet")
    assert "| forward | 1 |" in section and "| 7 |" not in section


def test_page_is_self_contained(tmp_path):
    path = tmp_path / "page.html"
    write_result(result(record(), record("PyTorch"), record("timm", status="missing", reason="no", ms=None)), tmp_path)
    assert cli.main(["benchmark", "report", str(tmp_path), "--out", str(path)]) == 0
    page = path.read_text()
    assert not re.search(r"https?://|<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bhref=", page)
    assert page.count("<svg") == page.count("</svg>") == 1 and 'class="roof"' in page
    for result_ in load_results([tmp_path]):
        assert f"<h3>{result_['operation']}</h3>" in page
        for name in {one["provider"] for one in result_["records"]}:
            assert name in page


def test_page_shows_speed_ups_escapes_names_and_joins_folders(tmp_path):
    write_result(result(record(median=1.0), record("PyTorch", median=0.5)), tmp_path / "a")
    write_result(result(record(median=1.0), record("PyTorch", median=2.0)), tmp_path / "b")
    page = render_page(load_results([tmp_path / "a", tmp_path / "b"]))
    assert '<td class="number slower">0.50x</td>' in page and '<td class="number">2.00x</td>' in page
    assert "Some &lt;GPU&gt;" in page and "<GPU>" not in page
    assert page.count("<h2>") == 2


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ({"speed_up": 1.5, "of_floor": 0.9}, "1.5x: met, 90% of roofline: missed"),
        ({"speed_up": 2.5}, "2.5x: missed"),
        ({"memory": 0.75}, "0.75x the memory: met"),
        ({"memory": 0.25}, "0.25x the memory: missed"),
        ({"over PyTorch": 2.0}, "2x PyTorch: met"),
        ({"over PyTorch": 2.1}, "2.1x PyTorch: missed"),
        ({"over timm": 1.0}, "1x timm: not measured"),
        ({"images_per_s": 12000}, "12,000 images/s: missed"),
    ],
)
def test_targets_are_reported_as_met_or_missed(targets, text):
    records = [record(targets=targets, peak_bytes=500, images_per_s=100.0)]
    records.append(record("PyTorch", median=2.0, targets=targets))
    (comparison,) = compare_providers([result(*records)])
    assert format_targets(comparison) == text
    (comparison,) = compare_providers([result(records[0] | {"status": "wrong", "ms": None})])
    assert "met" not in format_targets(comparison) and "not measured" in format_targets(comparison)


def test_roofline_places_points_under_the_roof():
    slow, fast = record(), record("PyTorch", tflop_per_s=30.0)  # 10 FLOP a byte: the roof is 30 TFLOP/s
    svg = draw_roofline([result(slow, fast)], "bfloat16")
    heights = {kind: float(y) for kind, y in re.findall(r'<circle class="(\w+)"[^>]* cy="([\d.]+)"', svg)}
    x, y = re.search(r'class="other" cx="([\d.]+)" cy="([\d.]+)"', svg).groups()
    roof = re.search(r'class="roof" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)', svg)
    x0, y0, x1, y1 = map(float, roof.groups())
    assert heights["ours"] > heights["other"]  # lower on the page
    assert float(y) == pytest.approx(y0 + (float(x) - x0) / (x1 - x0) * (y1 - y0), abs=0.2)
    assert draw_roofline([result(slow)], "float32") == ""


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
def test_bars_are_drawn(tmp_path):
    draw_bars(result(record(), record("PyTorch", median=2.0), record("timm", status="missing", ms=None)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["layer_norm.png"]


def test_memory_alone_is_compared_with_the_smallest(capsys):
    def measured(provider, count):
        return record(provider, status="measured", ms=None, peak_bytes=count)

    records = [measured("fastvit", 512), measured("PyTorch", 2048), measured("PyTorch flash", 1024)]
    print_table([result(*records, memory_only=True)])
    assert re.search(r"PyTorch flash .*512 B : 1 KiB", capsys.readouterr().out)


def test_best_of_ours_is_compared_with_the_best_of_the_others(capsys):
    records = [record(median=2.0), record("fastvit compiled", median=1.5), record("PyTorch", median=4.0)]
    records += [record("Liger-Kernel", median=3.0), record("flash-attn", status="missing", reason="no", ms=None)]
    (comparison,) = compare_providers([result(*copy.deepcopy(records))])
    assert (comparison.ours["provider"], comparison.rival["provider"]) == ("fastvit compiled", "Liger-Kernel")
    assert comparison.speed_up == pytest.approx(2.0)
    print_table([result(*records)])
    assert "flash-attn: missing: no" in capsys.readouterr().out
