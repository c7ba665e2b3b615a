"""The folder of a run: its lock, what --resume may change, and the modes of its files."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import interrupted_run as fault
import pytest
import torch
import transformers
import yaml
from interrupted_run import OPTIONS, Run, start_server
from launch import launch, read_output, run_finetune
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers.trainer_utils import get_last_checkpoint

from fastvit import cli
from fastvit.errors import InputError
from fastvit.files import reset_modes
from fastvit.models.loading import load_pretrained
from fastvit.train import lock
from fastvit.train.finetune import main
from fastvit.train.lock import LOCK_FILE, FolderLock

PLAIN = ["--scheduler", "linear", "--warmup", "0", "--weight-decay", "0"]


@pytest.fixture(scope="module")
def server():
    with start_server():
        yield


@pytest.fixture(scope="module")
def stopped(server, tmp_path_factory):
    """A run that was stopped by SIGTERM after 6 of 10 steps; tests copy its folder."""
    folder = tmp_path_factory.mktemp("stopped")
    run = Run(folder, *PLAIN, fault=fault.send_signal_at, fault_args=(signal.SIGTERM, 5, "training_step"))
    assert run.wait() == 143, run.read_log()
    return folder / "out"


def read_state(out: Path) -> dict:
    return json.loads((out / "trainer_state.json").read_text())


def read_rates(out: Path) -> list[float]:
    """The learning rates of the steps, as logged."""
    return [log["learning_rate"] for log in read_state(out)["log_history"] if "loss" in log]


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time
# ---------------------------------------------------------------------------------------------------------------------


def write_lock(folder: Path, age: float = 0.0, **changes) -> Path:
    """Write the lock of another process, which gave its last sign of life `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = {**lock.identify_process(), "launch": None, "since": time.time() - 60} | changes
    (folder / LOCK_FILE).write_text(json.dumps(holder))
    os.utime(folder / LOCK_FILE, (time.time() - age,) * 2)
    return folder / LOCK_FILE


def find_dead_pid() -> int:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    return process.pid


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_second_run_in_a_folder_names_the_first_and_leaves_it_alone(option, server, tmp_path):
    first = Run(tmp_path, "--max-steps", "1000000", "--eval-steps", "1000000")
    while "loss" not in first.read_log():
        time.sleep(0.05)
    second_folder = tmp_path / "second"
    second = Run(second_folder, option, "--output-dir", str(tmp_path / "out"))
    assert second.wait() == 2, second.read_log()
    (line,) = second.read_log().splitlines()
    assert line.startswith(
        f"error: --output-dir: {tmp_path / 'out'} is in use by another run: process {first.process.pid} on"
        f" {socket.gethostname()}, since 20"
    )
    assert first.process.is_alive()
    first.process.terminate()
    assert first.wait() == 143, first.read_log()
    assert not (tmp_path / "out" / LOCK_FILE).exists()
    assert "Traceback" not in first.read_log()


def test_lock_of_a_killed_run_is_taken_over(server, tmp_path):
    run = Run(tmp_path, fault=fault.kill_after_checkpoint)
    assert run.wait() == -signal.SIGKILL
    assert (tmp_path / "out" / LOCK_FILE).exists()
    again = Run(tmp_path, "--resume")
    assert again.wait() == 0, again.read_log()
    assert not list((tmp_path / "out").glob(f"{LOCK_FILE}*"))


@pytest.mark.parametrize(
    ("fault_function", "fault_args", "code"),
    [
        (None, (), 0),
        (fault.inject_nan_at, (4,), 2),
        (fault.send_signal_at, (signal.SIGINT, 4, "training_step"), 130),
        (fault.send_signal_at, (signal.SIGINT, 4, "training_step", 2), 130),
    ],
    ids=["normal end", "error", "Ctrl-C", "Ctrl-C twice"],
)
def test_lock_is_released_at_every_end(fault_function, fault_args, code, server, tmp_path):
    run = Run(tmp_path, fault=fault_function, fault_args=fault_args)
    assert run.wait() == code, run.read_log()
    assert (tmp_path / "out" / "config.yaml").exists()
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def test_lock_of_another_machine_says_how_to_remove_it_and_expires(tmp_path):
    path = write_lock(tmp_path / "run", age=90, host="far", pid=7)
    with pytest.raises(InputError, match=r"process 7 on far, since .* \(last sign of life 9\d s ago\)") as error:
        FolderLock(tmp_path / "run").__enter__()
    assert f"if that process is dead, delete {path}, or wait: the lock expires after 10 minutes" in str(error.value)
    write_lock(tmp_path / "run", age=700, host="far", pid=7)
    with FolderLock(tmp_path / "run") as own:
        assert path.read_bytes() == own.content
    assert list((tmp_path / "run").iterdir()) == []


def test_lock_of_another_container_with_the_name_of_its_host_is_respected(tmp_path):
    write_lock(tmp_path, namespace="pid:[1]", pid=find_dead_pid())
    with pytest.raises(InputError, match="is in use by another run"):
        FolderLock(tmp_path).__enter__()


def test_restart_on_another_machine_takes_over_the_lock_of_its_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-12")
    write_lock(tmp_path, host="far", launch="job-11")
    with pytest.raises(InputError, match="on far"):
        FolderLock(tmp_path).__enter__()
    write_lock(tmp_path, host="far", launch="job-12")
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"started": 5.0}, True),  # the machine's clock was set
        ({"started": 5.0, "uptime": 0.5}, False),  # another process had the number, before the machine was started
    ],
)
def test_process_is_identified_by_its_number_and_start(changes, expected):
    assert lock.is_alive(lock.identify_process() | changes) is expected
    assert lock.is_alive(lock.identify_process() | {"pid": find_dead_pid()}) is False


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": "x"}', b"\xff"])
def test_lock_whose_writer_was_killed_is_taken_over(content, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "UNREADABLE", 0.1)
    (tmp_path / LOCK_FILE).write_bytes(content)
    with FolderLock(tmp_path) as own:
        assert (tmp_path / LOCK_FILE).read_bytes() == own.content


def contend(folder: Path, barrier, winners) -> None:
    barrier.wait()
    try:
        with FolderLock(folder):
            with winners.get_lock():
                winners.value += 1
            barrier.wait()  # the others have ended their attempt
    except InputError:
        barrier.wait()


@pytest.mark.parametrize("is_stale", [True, False])
def test_one_of_many_gets_the_lock(is_stale, tmp_path):
    context = multiprocessing.get_context("fork")
    dead = find_dead_pid()
    for number in range(10):
        folder = tmp_path / str(number)
        if is_stale:
            write_lock(folder, pid=dead)
        barrier, winners = context.Barrier(6), context.Value("i", 0)
        processes = [context.Process(target=contend, args=(folder, barrier, winners)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert winners.value == 1
        assert not folder.exists() or list(folder.iterdir()) == []


def test_run_stops_once_its_lock_was_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with FolderLock(tmp_path) as own:
        os.utime(own.path, (0, 0))
        deadline = time.monotonic() + 10
        while own.path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - own.path.stat().st_mtime < 60  # a sign of life
        write_lock(tmp_path, host="far")
        while not own.is_lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(InputError, match="another process has taken over"):
            lock.StopOnLostLock(own).on_step_end(None, None, None)
    assert (tmp_path / LOCK_FILE).exists()  # it is that of the other process


def test_folds_and_their_folder_lock_each_other(tmp_path):
    path = write_lock(tmp_path / "runs" / "fold-2", host="far")
    with pytest.raises(InputError, match=r"fold-2 is in use"):
        FolderLock(tmp_path / "runs").__enter__()
    assert not (tmp_path / "runs" / LOCK_FILE).exists()
    path.unlink()
    write_lock(tmp_path / "runs", host="far")
    with pytest.raises(InputError, match=r"runs is in use"):
        FolderLock(tmp_path / "runs" / "fold-2").__enter__()
    assert not (tmp_path / "runs" / "fold-2" / LOCK_FILE).exists()


@pytest.mark.parametrize(
    "argv",
    [["finetune", *OPTIONS, "--folds", "2", "--resume"], ["finetune", *OPTIONS, "--resume"], ["sweep", *OPTIONS]],
    ids=["folds", "finetune", "sweep"],
)
def test_commands_respect_the_lock(argv, tmp_path, capsys):
    write_lock(tmp_path / "out", host="far")
    assert cli.main([*argv, "--output-dir", str(tmp_path / "out")]) == 2
    assert "is in use by another run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


def test_several_processes_respect_the_lock_and_say_so_once(tmp_path):
    write_lock(tmp_path / "out", host="far")
    argv = [*OPTIONS, "--output-dir", str(tmp_path / "out"), "--resume"]
    with pytest.raises(ChildFailedError):
        launch(run_finetune, argv, str(tmp_path / "cache"), None, logs=tmp_path / "logs")
    errors = [read_output(tmp_path / "logs", rank, "stderr") for rank in (0, 1)]
    assert ["is in use by another run" in error for error in errors] == [True, False]
    assert "Traceback" not in "".join(errors)


# ---------------------------------------------------------------------------------------------------------------------
# Options that differ from the run's
# ---------------------------------------------------------------------------------------------------------------------


def resume(stopped: Path, folder: Path, *options: str) -> Run:
    shutil.copytree(stopped, folder / "out")
    run = Run(folder, *PLAIN, *options, "--resume")
    assert run.wait() == 0, run.read_log()
    return run


def test_learning_rate_and_weight_decay_of_a_resumed_run_apply(stopped, tmp_path):
    resume(stopped, tmp_path, "--learning-rate", "5e-4", "--weight-decay", "0.1")
    expected = [1e-3 * (1 - step / 10) for step in range(6)] + [5e-4 * (1 - step / 10) for step in range(6, 10)]
    assert read_rates(tmp_path / "out") == pytest.approx(expected)
    groups = torch.load(tmp_path / "out" / "checkpoint-10" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(5e-4, 0.1), (5e-4, 0.0)]


def test_schedule_warmup_and_length_of_a_resumed_run_apply(stopped, tmp_path):
    resume(stopped, tmp_path, "--scheduler", "constant_with_warmup", "--warmup", "8", "--max-steps", "12")
    before = [1e-3 * (1 - step / 10) for step in range(6)]
    assert read_rates(tmp_path / "out") == pytest.approx([*before, 0.75e-3, 0.875e-3, *[1e-3] * 4])


def test_layer_decay_of_a_resumed_run_applies(server, tmp_path):
    options = ["--layer-decay", "0.7"]
    run = Run(tmp_path, *options, fault=fault.send_signal_at, fault_args=(signal.SIGTERM, 5, "training_step"))
    assert run.wait() == 143, run.read_log()
    again = Run(tmp_path, "--layer-decay", "0.5", "--weight-decay", "0.1", "--resume")
    assert again.wait() == 0, again.read_log()
    groups = torch.load(tmp_path / "out" / "checkpoint-10" / "optimizer.pt", weights_only=True)["param_groups"]
    rates = sorted({group["initial_lr"] for group in groups}, reverse=True)
    assert rates == pytest.approx([1e-3 * 0.5**depth for depth in range(6)])
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_intervals_and_patience_of_a_resumed_run_apply(server, tmp_path):
    options = ["--early-stopping", "9", "--eval-steps", "2"]
    run = Run(tmp_path, *options, fault=fault.send_signal_at, fault_args=(signal.SIGTERM, 5, "training_step"))
    assert run.wait() == 143, run.read_log()
    again = Run(tmp_path, "--early-stopping", "7", "--eval-steps", "4", "--logging-steps", "4", "--resume")
    assert again.wait() == 0, again.read_log()
    state = read_state(tmp_path / "out")
    assert state["stateful_callbacks"]["EarlyStoppingCallback"]["args"]["early_stopping_patience"] == 7
    logs = state["log_history"]
    assert [log["step"] for log in logs if "eval_loss" in log] == [2, 4, 8, 10]
    assert [log["step"] for log in logs if "loss" in log][6:] == [8, 10]  # 10: before the last checkpoint


@pytest.mark.parametrize(
    "options",
    [
        ["--precision", "bf16"],
        ["--label-smoothing", "0.1", "--hidden-dropout", "0.2", "--drop-path", "0.1"],
        ["--mixup", "0.2", "--class-balanced", "--flip", "--calibrate"],
        ["--batch-size", "2", "--gradient-accumulation", "2"],
        ["--batch-size", "8"],  # with --max-steps, no epochs are counted
        ["--no-augment", "--workers", "1", "--gradient-checkpointing", "--keep-checkpoints", "0"],
    ],
    ids=lambda options: options[0],
)
def test_other_options_of_a_resumed_run_may_change(options, stopped, tmp_path):
    run = resume(stopped, tmp_path, *options)
    stored = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    name = options[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    assert f"note: {name} is {stored[name]}; the run had" in run.read_log()


REFUSED = [
    (["--seed", "7"], "--seed: the run in out has 42, got 7"),
    (["--layer-decay", "0.5"], "--layer-decay: the run in out has 1.0, got 0.5"),
    (["--validation-fraction", "0.3"], "--validation-fraction: the run in out has 0.15, got 0.3"),
    (["--folds", "2", "--fold", "1"], "--folds: the run in out has none, got 2"),
    (["--ema", "0.9"], "--ema: the run in out has none, got 0.9"),
    (["--image-size", "24"], "--image-size: the run in out has 16, got 24"),
    (["--from-scratch", "tiny"], "--from-scratch: the run in out has micro, got tiny"),
    (["--freeze-backbone"], "--freeze-backbone: the run in out has false, got true"),
    (["--scheduler", "reduce_lr_on_plateau"], "--scheduler: the run in out has linear, got reduce_lr_on_plateau"),
    (["--max-steps", "-1", "--batch-size", "8"], "--batch-size: the run in out has 4, got 8"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[options[0] for options, _ in REFUSED])
def test_options_that_a_checkpoint_overrides_are_refused(options, message, stopped, tmp_path, capsys, monkeypatch):
    shutil.copytree(stopped, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "out" / "config.yaml").read_bytes()
    assert main([*OPTIONS, *PLAIN, "--output-dir", "out", *options, "--resume"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message}; it cannot change with --resume, as ")
    assert (tmp_path / "out" / "config.yaml").read_bytes() == before


def test_run_in_fp16_continues_in_another_precision(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    torch.save({"scale": 65536.0}, tmp_path / "out" / "checkpoint-6" / "scaler.pt")  # of the loss, on GPUs
    run = Run(tmp_path, *PLAIN, "--resume")
    assert run.wait() == 0, run.read_log()


def test_every_option_may_change_before_the_first_checkpoint(stopped, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(stopped / "config.yaml", tmp_path / "out")
    run = Run(tmp_path, "--seed", "7", "--layer-decay", "0.5", "--max-steps", "2", "--resume")
    assert run.wait() == 0, run.read_log()


def test_classes_of_a_resumed_run_are_those_of_the_checkpoint(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    config = Path(get_last_checkpoint(tmp_path / "out"), "config.json")
    stored = json.loads(config.read_text())
    first, second = stored["id2label"]["0"], stored["id2label"]["1"]
    stored["id2label"] |= {"0": second, "1": first}
    config.write_text(json.dumps(stored))
    run = Run(tmp_path, "--resume")
    assert run.wait() == 2, run.read_log()
    assert f"error: --resume: the run has the classes {second}, {first}, " in run.read_log()


def test_finished_folds_are_not_mixed_with_others(tmp_path, capsys):
    (tmp_path / "out" / "fold-1").mkdir(parents=True)
    (tmp_path / "out" / "fold-1" / "README.md").touch()
    (tmp_path / "out" / "config.yaml").write_text("folds: 3\nfrom_scratch: micro\npatch_size: 8\nimage_size: 16\n")
    assert main([*OPTIONS, "--folds", "2", "--resume", "--output-dir", str(tmp_path / "out")]) == 2
    assert "the run in" in (error := capsys.readouterr().err) and "has 3, got 2" in error


def test_training_time_of_a_resumed_run_covers_all_starts(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    earlier = state["stateful_callbacks"]["Clock"]["attributes"]
    assert 0 < earlier["earlier"] < 60
    earlier["earlier"] = 7200.0
    path.write_text(json.dumps(state))
    run = Run(tmp_path, *PLAIN, "--resume")
    assert run.wait() == 0, run.read_log()
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert 7200 < results["train_runtime"] < 7260
    assert results["train_steps_per_second"] == pytest.approx(10 / results["train_runtime"], abs=1e-3)
    assert results["train_samples_per_second"] == pytest.approx(40 / results["train_runtime"], abs=1e-3)
    (logged,) = [log for log in read_state(tmp_path / "out")["log_history"] if "train_runtime" in log]
    assert logged["train_runtime"] == results["train_runtime"]
    assert f'"train_runtime": {results["train_runtime"]}' in (tmp_path / "out" / "log.jsonl").read_text()
    assert ">2 h 00 min<" in (tmp_path / "out" / "report.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Files and messages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory):
    """A finished run in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("finished")
    run = Run(folder, "--max-steps", "2", "--output-dir", "my leaves")
    assert run.wait() == 0, run.read_log()
    return run


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def read_modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_files_of_a_run_have_the_mode_of_new_files(finished):
    mask = os.umask(0o077)
    os.umask(mask)
    assert read_modes(finished.folder / "my leaves") == {0o666 & ~mask}


@pytest.mark.parametrize("dest", ["hf", "timm.safetensors", "vit.npz"])
def test_converted_files_have_the_mode_of_new_files(dest, finished, umask, tmp_path):
    (tmp_path / "to").mkdir()
    assert cli.main(["convert", str(finished.folder / "my leaves"), str(tmp_path / "to" / dest)]) == 0
    assert read_modes(tmp_path / "to") == {0o640}


def test_files_of_adapters_have_the_mode_of_new_files(umask, tmp_path):
    written = tmp_path / "adapter" / "adapter_model.safetensors"
    written.parent.mkdir()
    os.close(os.open(written, os.O_CREAT, 0o600))
    reset_modes(written.parent)
    assert read_modes(tmp_path) == {0o640}


def test_commands_to_copy_quote_the_folder(finished):
    assert "try it: fastvit predict 'my leaves' IMAGE" in finished.read_log()


def test_label_is_shown_without_flops_and_progress_of_loading(finished, capfd):
    assert "total_flos" not in finished.read_log() and "train_runtime" in finished.read_log()
    image = str(finished.folder / "my leaves" / "examples.png")
    transformers.utils.logging.enable_progress_bar()  # a training run in this process has disabled it
    assert cli.main(["predict", str(finished.folder / "my leaves"), image, "--device", "cpu"]) == 0
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("command", ["predict", "attention", "finetune", "convert"])
def test_unfinished_run_names_the_checkpoint_to_use(command, stopped, tmp_path, monkeypatch, capsys):
    shutil.copytree(stopped, tmp_path / "leaves")
    monkeypatch.chdir(tmp_path)
    argv = {
        "finetune": ["--model", "leaves", "--dataset", "generated", "--output-dir", "out"],
        "convert": ["leaves", "converted"],
    }.get(command, ["leaves", "leaves/examples.png"])
    assert cli.main([command, *argv]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        "error: leaves: expected a finished run, found one without a model; use leaves/checkpoint-6, its last"
        " checkpoint, or finish it with `fastvit finetune` and --resume"
    )
    if command == "predict":
        assert cli.main(["predict", "leaves/checkpoint-6", "leaves/examples.png", "--device", "cpu"]) == 0


def test_folder_of_folds_and_run_without_a_checkpoint_are_named(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match="found one without a model; finish it with `fastvit finetune` and --resume"):
        load_pretrained(str(tmp_path))
    (tmp_path / "fold-1").mkdir()
    (tmp_path / "fold-1" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"found the folder of 1 folds; use one of them, such as .*fold-1"):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize("options", [[], ["--data-dir", "images"], ["--streaming"]], ids=["bare", "model", "streaming"])
def test_unreachable_hub_is_reported_at_once(options, tmp_path):
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (9, 9)).save(tmp_path / "images" / label / f"{number}.png")
    # In a new process, since the hub's address is read at import; nothing listens on port 9.
    program = (
        "import time; waits = []; time.sleep = waits.append\n"
        "from fastvit.train.finetune import main\n"
        f"assert main({options}) == 2\n"
        "assert sum(waits) < 1, waits\n"
        "import datasets, huggingface_hub\n"
        "assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "without a network use" in line and "Retrying" not in done.stderr
    assert not (tmp_path / "runs").exists()
