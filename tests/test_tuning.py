"""The choice of tiles: the table, the cache on disk, and what may go wrong with a file."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")
from fastvit.kernels import tuning

GPU = torch.device("cuda", 0)
CASE = ("layer_norm_forward", "many rows, 1024", torch.bfloat16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """A GPU to choose for, whether there is one or not, and an empty cache."""
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTVIT_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "describe", lambda device: tuning.Device("some GPU", "sm_90", 132))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget(monkeypatch)


def forget(monkeypatch):
    """As a new process would start."""
    monkeypatch.setattr(tuning, "_chosen", {})


def never(choice):
    raise AssertionError("launched, where the table or the cache should have been enough")


def time_as(monkeypatch, times):
    """Candidate number i takes times[i], or cannot be launched."""
    remaining = list(times)

    def do_bench(run, **options):
        run()
        time = remaining.pop(0)
        if time is None:
            raise tuning.triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return time

    monkeypatch.setattr(tuning.triton.testing, "do_bench", do_bench)
    return remaining


def test_without_measurements_the_table_decides():
    options = tuning.candidates(*CASE, GPU)
    assert len(options) > 1
    assert tuning.choose(*CASE, GPU, never) == options[0]
    assert not tuning.cache_path().exists()


def test_every_kernel_and_kind_of_gpu_has_a_tile(monkeypatch):
    for architecture in ("interpreter", "sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"):
        monkeypatch.setattr(tuning, "describe", lambda device, a=architecture: tuning.Device("some GPU", a, 132))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for operation in ("layer_norm_forward", "layer_norm_backward"):
                assert tuning.candidates(operation, "few rows, 64", dtype, GPU)
            for operation in ("patch_embed_forward", "patch_embed_weight", "patch_embed_pixels"):
                for many in ("many", "few"):
                    assert tuning.candidates(operation, f"{many} tiles, 768x3x16x16", dtype, GPU)
    with pytest.raises(KeyError, match="no tile for convolution"):
        tuning.candidates("convolution", "", torch.float32, GPU)


def test_what_was_measured_is_kept_and_used_by_the_next_process(monkeypatch):
    options = tuning.candidates(*CASE, GPU)
    monkeypatch.setenv("FASTVIT_AUTOTUNE", "1")
    time_as(monkeypatch, [3.0, 1.0, 2.0])
    assert tuning.choose(*CASE, GPU, lambda choice: None) == options[1]
    assert len(json.loads(tuning.cache_path().read_text())) == 1
    for mode in ("1", ""):
        forget(monkeypatch)
        monkeypatch.setenv("FASTVIT_AUTOTUNE", mode)
        assert tuning.choose(*CASE, GPU, never) == options[1]
    forget(monkeypatch)
    monkeypatch.setenv("FASTVIT_AUTOTUNE", "0")
    assert tuning.choose(*CASE, GPU, never) == options[0]


def test_an_unknown_mode_is_named(monkeypatch):
    monkeypatch.setenv("FASTVIT_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FASTVIT_AUTOTUNE: expected 0, 1 or nothing, got 'yes'"):
        tuning.choose(*CASE, GPU, never)


def test_a_choice_is_made_once_in_a_process(monkeypatch):
    monkeypatch.setattr(tuning, "read_cache", lambda: {})
    first = tuning.choose(*CASE, GPU, never)
    monkeypatch.setattr(tuning, "read_cache", never)
    assert tuning.choose(*CASE, GPU, never) is first


def test_a_tile_that_cannot_be_launched_is_passed_over(monkeypatch):
    options = tuning.candidates(*CASE, GPU)
    time_as(monkeypatch, [None, 5.0, 4.0])
    assert tuning.fastest(options, lambda choice: None) == options[2]


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setenv("FASTVIT_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    options = tuning.candidates(*CASE, GPU)
    assert tuning.choose(*CASE, GPU, never) == options[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    time_as(monkeypatch, [2.0, 1.0, 3.0])
    assert tuning.choose(*CASE, GPU, lambda choice: None) == options[1]


def test_a_measurement_of_a_tile_that_left_the_table_is_not_used(monkeypatch):
    options = tuning.candidates(*CASE, GPU)
    monkeypatch.setenv("FASTVIT_AUTOTUNE", "1")
    time_as(monkeypatch, [2.0, 1.0, 3.0])
    tuning.choose(*CASE, GPU, lambda choice: None)
    forget(monkeypatch)
    monkeypatch.setattr(tuning, "candidates", lambda *case: (options[0], options[2]))
    monkeypatch.setenv("FASTVIT_AUTOTUNE", "")
    assert tuning.choose(*CASE, GPU, never) == options[0]


@pytest.mark.parametrize(
    "content", [b"{", b"[1, 2]", b"\xff\xfe", b""], ids=["cut off", "no table", "not text", "empty"]
)
def test_a_corrupt_cache_is_ignored_with_a_warning_and_rewritten(content):
    tuning.cache_path().parent.mkdir(parents=True)
    tuning.cache_path().write_bytes(content)
    with pytest.warns(UserWarning, match=r"tuning\.json is not a tuning cache"):
        assert tuning.choose(*CASE, GPU, never) == tuning.candidates(*CASE, GPU)[0]
    assert json.loads(tuning.cache_path().read_text()) == {}


def test_measurements_that_cannot_be_kept_are_reported_and_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "file" / "cache"))  # no folder can be made there
    monkeypatch.setenv("FASTVIT_AUTOTUNE", "1")
    time_as(monkeypatch, [2.0, 1.0, 3.0])
    with pytest.warns(UserWarning, match="measurements are not kept"):
        assert tuning.choose(*CASE, GPU, lambda choice: None) == tuning.candidates(*CASE, GPU)[1]


@pytest.mark.filterwarnings("error")
def test_processes_may_write_at_once():
    """None of what several processes add is lost, and what a reader sees is always whole."""
    code = (
        "import sys\nfrom fastvit.kernels import tuning\n"
        "for i in range(20): tuning.add_to_cache(f'{sys.argv[1]} {i}', {'num_warps': i})\n"
    )
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(subprocess.run, [sys.executable, "-c", code, name], check=True) for name in "abc"]
        while not all(writer.done() for writer in writers):
            assert isinstance(tuning.read_cache(), dict)
        for writer in writers:
            writer.result()
    assert len(tuning.read_cache()) == 60
    assert {path.name for path in tuning.cache_path().parent.iterdir()} <= {"tuning.json", "tuning.lock"}
