"""Interrupted runs lose nothing but the steps since the last checkpoint."""

import filecmp
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import interrupted_run as fault
import numpy as np
import pytest
import torch
import yaml
from interrupted_run import Run, start_server
from PIL import Image
from safetensors.torch import load_file

from fastvit.data.images import Augment, ImageCache, ImageSet, cache_images
from fastvit.errors import InputError, is_out_of_memory
from fastvit.files import PARTIAL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed as on Linux")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, and its duration in seconds."""
    with start_server():
        folder = tmp_path_factory.mktemp("finished")
        started = time.perf_counter()
        run = Run(folder, fault=fault.kill_at_change, fault_args=(0,))
        assert run.wait() == 0, run.read_log()
        run.seconds = time.perf_counter() - started
        yield run


def check_checkpoints(out: Path) -> list[str]:
    """Check that every checkpoint is complete; returns their names."""
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
    for checkpoint in checkpoints:
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
        assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert torch.load(checkpoint / "scheduler.pt", weights_only=True)
        assert (checkpoint / "rng_state.pth").stat().st_size > 0
        assert f"checkpoint-{json.loads((checkpoint / 'trainer_state.json').read_text())['global_step']}" in str(
            checkpoint
        )
    return [checkpoint.name for checkpoint in checkpoints]


def check_same(folder: Path, expected: Path) -> None:
    """Check that two finished runs have the same bits: the model, and the last checkpoint with its optimizer."""
    for name in ("model.safetensors", "checkpoint-10/model.safetensors"):
        is_same = filecmp.cmp(folder / "out" / name, expected / "out" / name, shallow=False)
        assert is_same, name  # outside of the assertion: pytest would print the difference of two models
    first, second = (torch.load(f / "out/checkpoint-10/optimizer.pt", weights_only=True) for f in (folder, expected))
    assert first["param_groups"] == second["param_groups"]
    for index, state in first["state"].items():
        assert all(torch.equal(value, second["state"][index][name]) for name, value in state.items())
    states = [json.loads((f / "out" / "trainer_state.json").read_text()) for f in (folder, expected)]
    for name in ("loss", "eval_loss"):
        logged = [{log["step"]: log[name] for log in state["log_history"] if name in log} for state in states]
        assert logged[0] == logged[1], name
    assert states[0]["best_metric"] == states[1]["best_metric"]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]
    assert not (folder / "out" / PARTIAL).exists()


def resume(folder: Path, finished: Run, *options: str) -> Run:
    """Resume the run in `folder`; it ends like `finished`."""
    run = Run(folder, *options, "--resume")
    assert run.wait() == 0, run.read_log()
    check_same(folder, finished.folder)
    return run


def test_runs_with_one_seed_are_the_same_and_with_another_are_not(finished, tmp_path):
    again, other = Run(tmp_path / "again", "--workers", "2"), Run(tmp_path / "other", "--seed", "7")
    assert again.wait() == other.wait() == 0, again.read_log() + other.read_log()
    check_same(again.folder, finished.folder)
    with pytest.raises(AssertionError):
        check_same(other.folder, finished.folder)


def test_run_is_killed_at_20_random_moments(finished, tmp_path):
    generator = random.Random(8)
    survived, seconds = 0, finished.seconds
    for number in range(20):
        run = Run(tmp_path / str(number))
        time.sleep(generator.uniform(0, seconds))
        run.process.kill()
        if run.wait() == 0:  # the machine is less loaded than when `finished` ran
            survived, seconds = survived + 1, 0.8 * seconds
        check_checkpoints(run.folder / "out")
        resume(run.folder, finished)
    assert survived <= 5


def test_run_is_killed_before_any_change_of_a_file(finished, tmp_path):
    changes = int((finished.folder / "changes").read_text())
    assert changes > 60
    for number in range(1, changes, changes // 8):
        run = Run(tmp_path / str(number), fault=fault.kill_at_change, fault_args=(number,))
        assert run.wait() == -signal.SIGKILL, run.read_log()
        check_checkpoints(run.folder / "out")
        resume(run.folder, finished)


@pytest.mark.parametrize(
    ("name", "number", "complete"),
    [
        ("model.safetensors", 1, []),
        ("model.safetensors", 3, ["checkpoint-2", "checkpoint-4"]),
        ("optimizer.pt", 3, ["checkpoint-2", "checkpoint-4"]),
    ],
)
def test_incomplete_checkpoint_is_not_one(name, number, complete, finished, tmp_path):
    run = Run(tmp_path, "--keep-checkpoints", "0", fault=fault.kill_half_way_through, fault_args=(name, number))
    assert run.wait() == -signal.SIGKILL, run.read_log()
    assert check_checkpoints(tmp_path / "out") == complete
    assert list((tmp_path / "out" / PARTIAL).glob("checkpoint-*"))
    resume(tmp_path, finished)


def test_partly_deleted_checkpoint_is_not_one(finished, tmp_path):
    run = Run(tmp_path, "--keep-checkpoints", "1", fault=fault.kill_during_deletion)
    assert run.wait() == -signal.SIGKILL, run.read_log()
    (half,) = (tmp_path / "out" / PARTIAL).glob("deleted-checkpoint-*")
    assert half.name.removeprefix("deleted-") not in check_checkpoints(tmp_path / "out")
    resume(tmp_path, finished)


def test_incomplete_model_is_not_one(finished, tmp_path):
    run = Run(
        tmp_path, fault=fault.kill_half_way_through, fault_args=("model.safetensors", 6)
    )  # after five checkpoints
    assert run.wait() == -signal.SIGKILL, run.read_log()
    assert "checkpoint-10" in check_checkpoints(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    resume(tmp_path, finished)


def test_one_checkpoint_per_start_is_enough(finished, tmp_path):
    starts = 0
    while (code := Run(tmp_path, "--resume", fault=fault.kill_after_checkpoint).wait()) == -signal.SIGKILL:
        starts += 1
        assert check_checkpoints(tmp_path / "out")[-1] == f"checkpoint-{2 * starts}"
    assert code == 0 and starts == 5
    check_same(tmp_path, finished.folder)


@pytest.mark.parametrize(
    ("signum", "step", "method", "checkpoint"),
    [
        (signal.SIGINT, 4, "training_step", 5),
        (signal.SIGTERM, 4, "training_step", 5),
        (signal.SIGTERM, 5, "training_step", 6),
        (signal.SIGTERM, 6, "prediction_step", 6),
        (signal.SIGTERM, 10, "prediction_step", 10),
    ],
    ids=["Ctrl-C in a step", "in a step", "in a step to be evaluated", "in an evaluation", "in the last evaluation"],
)
def test_signal_saves_a_checkpoint_to_resume_from(signum, step, method, checkpoint, finished, tmp_path):
    run = Run(tmp_path, fault=fault.send_signal_at, fault_args=(signum, step, method))
    assert run.wait() == 128 + signum, run.read_log()
    assert f"{'interrupted' if signum == signal.SIGINT else 'SIGTERM received'}: saving a checkpoint" in run.read_log()
    assert (
        f"stopped at step {checkpoint}; out/checkpoint-{checkpoint} is complete: the same command with --resume"
        " continues from it" in run.read_log()
    )
    assert f"checkpoint-{checkpoint}" in check_checkpoints(tmp_path / "out")
    state = json.loads((tmp_path / "out" / f"checkpoint-{checkpoint}" / "trainer_state.json").read_text())
    evaluated = [log["step"] for log in state["log_history"] if "eval_loss" in log]
    assert checkpoint not in evaluated  # aborted
    resume(tmp_path, finished)


def test_sigterm_from_outside_ends_with_a_checkpoint_within_ten_seconds(finished, tmp_path):
    run = Run(tmp_path, "--max-steps", "1000000", "--eval-steps", "1000000")
    while "loss" not in run.read_log():
        time.sleep(0.05)
    started = time.perf_counter()
    run.process.terminate()
    assert run.wait() == 143
    assert time.perf_counter() - started < 10
    (checkpoint,) = check_checkpoints(tmp_path / "out")
    assert f"out/{checkpoint} is complete" in run.read_log()


def test_repeated_evaluation_can_be_interrupted_too(finished, tmp_path):
    for _ in range(2):
        run = Run(tmp_path, "--resume", fault=fault.send_signal_at, fault_args=(signal.SIGTERM, 6, "prediction_step"))
        assert run.wait() == 143, run.read_log()
        assert check_checkpoints(tmp_path / "out")[-1] == "checkpoint-6"
    resume(tmp_path, finished)


def test_workers_that_receive_the_signal_finish_the_last_step(finished, tmp_path):
    run = Run(tmp_path, "--workers", "2", fault=fault.send_signal_to_all_at, fault_args=(5,))
    started = time.perf_counter()
    assert run.wait() == 143, run.read_log()
    assert time.perf_counter() - started < 10 * finished.seconds + 10  # no process waits for the alarm of a worker
    assert check_checkpoints(tmp_path / "out")[-1] == "checkpoint-6"
    resume(tmp_path, finished)


def test_second_interrupt_stops_at_once(finished, tmp_path):
    run = Run(tmp_path, fault=fault.send_signal_at, fault_args=(signal.SIGINT, 4, "training_step", 2))
    assert run.wait() == 130, run.read_log()
    assert check_checkpoints(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]
    resume(tmp_path, finished)


def test_resume_of_no_run_starts_one(finished, tmp_path):
    run = resume(tmp_path, finished)
    assert "note: there is no checkpoint in out; the run starts from the beginning" in run.read_log()


def test_resume_of_a_finished_run_changes_nothing(finished, tmp_path):
    shutil.copytree(finished.folder / "out", tmp_path / "out")
    read = {path.name: path.read_bytes() for path in sorted((tmp_path / "out").iterdir()) if path.is_file()}
    resume(tmp_path, finished)
    for name, content in read.items():
        if name in ("eval_results.json", "all_results.json", "trainer_state.json"):  # runtimes
            before, after = (json.loads(text) for text in (content, (tmp_path / "out" / name).read_text()))
            assert before.keys() == after.keys()
            assert before.get("eval_accuracy") == after.get("eval_accuracy")
            assert before.get("train_loss") == after.get("train_loss")
        elif name not in ("training_args.bin", "log.jsonl", "report.html"):
            is_same = (tmp_path / "out" / name).read_bytes() == content
            assert is_same, name


def test_run_that_stopped_early_does_not_continue(finished, tmp_path):
    options = ["--early-stopping", "1", "--max-steps", "40", "--keep-checkpoints", "0"]
    whole = Run(tmp_path / "whole", *options)
    killed = Run(tmp_path / "killed", *options, fault=fault.kill_before_results)
    assert (whole.wait(), killed.wait()) == (0, -signal.SIGKILL), whole.read_log() + killed.read_log()
    names = check_checkpoints(whole.folder / "out")
    assert "checkpoint-40" not in names and names == check_checkpoints(killed.folder / "out")
    again = Run(killed.folder, *options, "--resume")
    assert again.wait() == 0, again.read_log()
    assert check_checkpoints(killed.folder / "out") == names
    first, second = ((run.folder / "out" / "model.safetensors").read_bytes() for run in (whole, killed))
    assert first == second


def test_folder_of_a_run_may_be_moved(finished, tmp_path):
    run = Run(tmp_path, fault=fault.kill_half_way_through, fault_args=("model.safetensors", 6))
    assert run.wait() == -signal.SIGKILL
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere" / "out")
    resume(tmp_path / "elsewhere", finished)


def test_resume_prints_the_options_that_differ(finished, tmp_path):
    shutil.copytree(finished.folder / "out", tmp_path / "out")
    run = Run(tmp_path, "--resume", "--max-steps", "12", "--learning-rate", "5e-4")
    assert run.wait() == 0, run.read_log()
    notes = [line for line in run.read_log().splitlines() if line.startswith("note:")]
    assert notes == [
        "note: learning_rate is 0.0005; the run had 0.001 before",
        "note: max_steps is 12; the run had 10 before",
    ]


def test_train_loss_covers_the_whole_run(finished, tmp_path):
    run = Run(tmp_path, fault=fault.send_signal_at, fault_args=(signal.SIGTERM, 6, "training_step"))
    assert run.wait() == 143
    resume(tmp_path, finished)
    ours, expected = (
        json.loads((folder / "out" / "train_results.json").read_text()) for folder in (tmp_path, finished.folder)
    )
    assert ours["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Options of a run
# ---------------------------------------------------------------------------------------------------------------------


def test_config_file_repeats_the_run(finished, tmp_path):
    run = Run(tmp_path)
    run.process.kill()
    run.wait()
    again = Run(tmp_path, only=["--config", str(finished.folder / "out" / "config.yaml"), "--overwrite"])
    assert again.wait() == 0, again.read_log()
    check_same(tmp_path, finished.folder)


def test_images_draw_random_numbers_of_their_own():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 18, 18, 3), dtype=np.uint8)
    images = ImageSet(ImageCache(pixels, {}), range(6), Augment((16, 16)), seed=3)
    first = [images[index]["pixel_values"] for index in range(6)]
    before = torch.get_rng_state()
    assert all(torch.equal(images[index]["pixel_values"], first[index]) for index in (5, 0, 3))
    assert torch.equal(torch.get_rng_state(), before)
    images.set_epoch(1)
    assert not any(torch.equal(images[index]["pixel_values"], first[index]) for index in range(6))
    other = ImageSet(ImageCache(pixels, {}), range(6), Augment((16, 16)), seed=4)
    assert not any(torch.equal(other[index]["pixel_values"], first[index]) for index in range(6))


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB, enough for three checkpoints of 5.5 MB: two to keep and one being written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_full_disk_ends_the_run_and_free_space_lets_it_continue(finished, small_disk):
    generator = random.Random(4)
    for number in range(3):
        folder = small_disk / str(number)
        folder.mkdir()
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(generator.randrange(5_000_000, 18_000_000)))
        run = Run(folder)
        assert run.wait() == 2, run.read_log()
        last = run.read_log().splitlines()[-1]
        assert last.startswith("error: cannot write out/checkpoint-"), last
        assert "No space left on device" in last or "the disk may be full" in last
        complete = check_checkpoints(folder / "out")
        assert (f"out/{complete[-1]} is complete" if complete else "there is no checkpoint yet") in last
        assert not (folder / "out" / PARTIAL).exists()  # its space is freed
        ballast.unlink()
        resume(folder, finished)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("size", "file"),
    [(2_000, "out"), (1_000_000, "out/checkpoint-2"), (3_000_000, "out/checkpoint-2")],
    ids=["of the example images", "of the weights", "of the optimizer"],
)
def test_failed_write_is_one_clear_line(size, file, finished, tmp_path):
    run = Run(tmp_path, fault=fault.limit_file_size, fault_args=(size,))
    assert run.wait() == 2, run.read_log()
    last = run.read_log().splitlines()[-1]
    assert last.startswith(f"error: cannot write {file}"), run.read_log()
    assert check_checkpoints(tmp_path / "out") == []
    assert not list((tmp_path / "out").rglob("*partial*"))
    resume(tmp_path, finished)


def test_read_only_folder_is_refused_before_anything_is_read(finished, tmp_path):
    (tmp_path / "out").mkdir()
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    (tmp_path / "log").touch()
    (tmp_path / "log").chmod(0o666)
    (tmp_path / "out").chmod(0o555)
    run = Run(tmp_path, fault=fault.drop_root_rights)
    assert run.wait() == 2, run.read_log()
    assert run.read_log() == "error: --output-dir: cannot write in out\n"
    other = Run(tmp_path, "--output-dir", "out/a/b", fault=fault.drop_root_rights)
    assert other.wait() == 2
    assert other.read_log() == f"error: --output-dir: cannot write in {tmp_path / 'out'}\n"


def test_images_larger_than_the_disk_are_not_decoded(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10_000))
    with pytest.raises(InputError, match=r"0\.0 GiB are free; FASTVIT_CACHE_DIR names another folder"):
        cache_images(lambda index: Image.new("RGB", (9, 9)), 5, (32, 32), cache_dir=tmp_path, memory_limit=0)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Memory and numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_batch_is_halved_until_it_fits(finished, tmp_path):
    run = Run(tmp_path / "found", "--auto-batch", fault=fault.limit_memory, fault_args=(1,))
    direct = Run(tmp_path / "direct", "--auto-batch", "--batch-size", "1", "--gradient-accumulation", "4")
    assert run.wait() == direct.wait() == 0, run.read_log() + direct.read_log()
    lines = [line for line in run.read_log().splitlines() if line.startswith("out of memory")]
    assert lines == [
        "out of memory with 4 images per batch; continuing with 2 and 2 batches per step",
        "out of memory with 2 images per batch; continuing with 1 and 4 batches per step",
    ]
    check_same(run.folder, direct.folder)
    stored = yaml.safe_load((run.folder / "out" / "config.yaml").read_text())
    assert (stored["batch_size"], stored["gradient_accumulation"], stored["auto_batch"]) == (1, 4, True)
    again = Run(tmp_path / "again", only=["--config", str(run.folder / "out" / "config.yaml")])
    assert again.wait() == 0 and "out of memory" not in again.read_log()
    check_same(again.folder, direct.folder)


def test_smaller_batches_train_the_same_steps(finished, tmp_path):
    whole = Run(tmp_path / "whole", "--hidden-dropout", "0", "--generated-images", "22")  # 18 images: 4, 4, 4, 4, 2
    parts = Run(tmp_path / "parts", "--hidden-dropout", "0", "--generated-images", "22", "--auto-batch",
                fault=fault.limit_memory, fault_args=(3,))  # fmt: skip
    assert whole.wait() == parts.wait() == 0, whole.read_log() + parts.read_log()
    first, second = (load_file(run.folder / "out/checkpoint-10/model.safetensors") for run in (whole, parts))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_later_out_of_memory_costs_the_steps_since_the_checkpoint(finished, tmp_path):
    run = Run(tmp_path, "--auto-batch", fault=fault.limit_memory, fault_args=(2, 5))
    assert run.wait() == 0, run.read_log()
    assert "out of memory with 4 images per batch; continuing with 2 and 2 batches per step" in run.read_log()
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 11))


def test_resume_keeps_the_batch_size_that_was_found(finished, tmp_path):
    run = Run(tmp_path, "--auto-batch", fault=fault.interrupt_with_limited_memory, fault_args=(2, 5))
    assert run.wait() == 143, run.read_log()
    again = Run(tmp_path, "--auto-batch", "--resume", fault=fault.limit_memory, fault_args=(2,))
    assert again.wait() == 0, again.read_log()
    assert "out of memory" not in again.read_log() and "note:" not in again.read_log()
    direct = Run(tmp_path / "direct", "--auto-batch", "--batch-size", "2", "--gradient-accumulation", "2")
    assert direct.wait() == 0
    check_same(tmp_path, direct.folder)


@pytest.mark.parametrize(
    ("options", "images", "advice"),
    [
        ([], 4, "try --auto-batch, a smaller --batch-size, --gradient-checkpointing or a smaller --image-size"),
        (["--auto-batch"], 1, "try --gradient-checkpointing or a smaller --image-size"),
    ],
    ids=["off", "one image is too large"],
)
def test_out_of_memory_is_one_clear_line(options, images, advice, finished, tmp_path):
    run = Run(tmp_path, *options, fault=fault.limit_memory, fault_args=(images - 1, 3))
    assert run.wait() == 2, run.read_log()
    last = run.read_log().splitlines()[-1]
    assert last.startswith(f"error: training: out of memory with {images} image(s) per batch after step")
    assert advice in last and "out/checkpoint-2 is complete: the same command with --resume continues from it" in last


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nCompile with"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("unable to mmap 1917116 bytes from file <m.safetensors>: Cannot allocate memory (12)"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for the matmul primitive. Run workload with"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("mebibytes", [68, 152, 260, 308])  # exhausted in different places
def test_out_of_memory_of_the_host_is_detected(mebibytes, finished, tmp_path):
    options = [
        "--auto-batch",
        "--image-size",
        "64",
        "--patch-size",
        "4",
        "--generated-images",
        "80",
        "--batch-size",
        "64",
    ]
    run = Run(tmp_path, *options, "--max-steps", "1", fault=fault.limit_address_space, fault_args=(mebibytes,))
    assert run.wait() == 0, run.read_log()
    assert "out of memory with 64 images per batch; continuing with 32 and 2 batches per step" in run.read_log()


def test_run_continues_from_before_the_weights_became_nan(finished, tmp_path):
    run = Run(tmp_path, fault=fault.inject_nan_at, fault_args=(4,))
    assert run.wait() == 2, run.read_log()
    last = run.read_log().splitlines()[-1]
    assert last.startswith("error: training: the loss is nan at step 5; the last good checkpoint is out/checkpoint-4")
    assert check_checkpoints(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]
    resume(tmp_path, finished)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_does_not_save_weights_that_are_nan(signum, finished, tmp_path):
    run = Run(tmp_path, "--logging-steps", "100", fault=fault.inject_nan_at, fault_args=(4, signum))
    assert run.wait() == 2, run.read_log()
    assert check_checkpoints(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]
