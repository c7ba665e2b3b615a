"""The log of a run, complete and torn, and its display by `fastvit watch`."""

import io
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from rich.console import Console

from fastvit import cli
from fastvit.cli import watch
from fastvit.report import run_log
from fastvit.report.run_log import LOG_FILE, RunLog


def begin(folder, step=0, max_steps=100, **process):
    process = run_log.identify_process() | process
    run_log.append_record(folder, "start", step, max_steps=max_steps, epochs=4.0, device="cpu", process=process)


def log_loss(folder, step, loss, **values):
    run_log.append_record(folder, "log", step, loss=loss, learning_rate=1e-3, epoch=step / 25, **values)


def read(folder) -> RunLog:
    log = RunLog(folder)
    log.read()
    return log


def shown(log: RunLog, *, terminal=False, width=80, once=True) -> tuple[str, int]:
    """The output of `watch`, and its exit code."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False)
    code = watch.watch(log, console, once=once, interval=0.01)
    return out.getvalue(), code


# ---------------------------------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------------------------------


def test_reader_returns_new_records_only(tmp_path):
    begin(tmp_path)
    log = RunLog(tmp_path)
    assert [record["event"] for record in log.read()] == ["start"]
    assert log.read() == []
    log_loss(tmp_path, 10, 2.5)
    assert [record["loss"] for record in log.read()] == [2.5]
    assert log.get_curve("loss") == [(10, 2.5)] and log.get_latest("learning_rate") == 1e-3


def test_incomplete_line_is_read_once_complete(tmp_path):
    begin(tmp_path)
    log = read(tmp_path)
    line = json.dumps({"event": "log", "time": 0.0, "step": 5, "loss": 1.0}) + "\n"
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write(line[:20])
        file.flush()
        assert log.read() == []
        file.write(line[20:])
    assert log.get_curve("loss") == [] and [record["loss"] for record in log.read()] == [1.0]


@pytest.mark.parametrize("torn", ['{"event": "log", "step": 1', "\x00\x00\x00", '{"no": "event"}\n', "[1, 2]\n"])
def test_torn_line_of_a_killed_process_is_skipped(torn, tmp_path):
    begin(tmp_path)
    log_loss(tmp_path, 10, 2.0)
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write(torn)
    log_loss(tmp_path, 20, 1.0)
    assert read(tmp_path).get_curve("loss") == [(10, 2.0), (20, 1.0)]


def test_resumed_run_discards_records_after_its_checkpoint(tmp_path):
    begin(tmp_path)
    for step in (10, 20, 30):
        log_loss(tmp_path, step, float(step))
        run_log.append_record(tmp_path, "checkpoint", step, checkpoint=f"checkpoint-{step}")
    run_log.append_record(tmp_path, "end", 30, outcome="interrupted", reason="")
    begin(tmp_path, step=20)
    log = read(tmp_path)
    assert log.end is None
    log_loss(tmp_path, 30, 3.5)
    log.read()
    assert log.get_curve("loss") == [(10, 10.0), (20, 20.0), (30, 3.5)]
    assert [one["checkpoint"] for one in log.checkpoints] == ["checkpoint-10", "checkpoint-20"]


def test_restarted_run_is_read_from_its_beginning(tmp_path):
    begin(tmp_path)
    for step in (10, 20, 30):
        log_loss(tmp_path, step, 1.0)
    log = read(tmp_path)
    (tmp_path / LOG_FILE).unlink()
    assert log.read() == [] and log.start is None and log.logs == []
    begin(tmp_path, max_steps=7)
    log.read()
    assert log.start["max_steps"] == 7 and log.logs == []


def test_numbers_that_are_not_finite_are_null_and_in_no_curve(tmp_path):
    begin(tmp_path)
    log_loss(tmp_path, 10, float("nan"), grad_norm=float("inf"))
    json.loads((tmp_path / LOG_FILE).read_text().splitlines()[-1], parse_constant=pytest.fail)
    log = RunLog(tmp_path)
    assert watch.format_record(log.read()[-1]) == "step 10: loss not finite"
    assert log.get_curve("loss") == [] and log.get_latest("grad_norm") is None
    assert "waiting" not in shown(log)[0]


def test_process_is_distinguished_from_a_later_one_with_its_pid():
    process = run_log.identify_process()
    assert run_log.is_alive(process) is True
    assert run_log.is_alive(process | {"started": process["started"] - 100}) is False
    assert run_log.is_alive(process | {"host": "another"}) is None


# ---------------------------------------------------------------------------------------------------------------------
# Display
# ---------------------------------------------------------------------------------------------------------------------


def test_view_before_the_first_log_shows_that_it_waits(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert "waiting for training to begin" in shown(RunLog(tmp_path))[0]
    begin(tmp_path)
    text = shown(RunLog(tmp_path))[0]
    assert "training, step 0" in text and "0/100 steps" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_view_shows_everything_at_a_glance(tmp_path, width):
    begin(tmp_path)
    for step in range(1, 51):
        log_loss(tmp_path, step, 4.0 / step, images_per_second=1234.5, memory_gib=1.25, peak_memory_gib=2.5)
    run_log.append_record(tmp_path, "log", 25, eval_accuracy=0.75, eval_loss=1.0)
    run_log.append_record(tmp_path, "log", 50, eval_accuracy=0.5, eval_loss=1.0)
    run_log.append_record(tmp_path, "checkpoint", 50, checkpoint="checkpoint-50")
    text = shown(RunLog(tmp_path), width=width)[0]
    assert all(len(line) <= width for line in text.splitlines())
    said = " ".join(text.split())
    for expected in ("50/100 steps", " left", "0.0800", "1,234 images/s", "1.25 GiB, peak 2.50 GiB", "checkpoint-50,"):
        assert expected in said
    assert "50.00% on validation; best 75.00% at step 25" in said
    rows = [line.split("│")[1].rstrip("\u2800 ") for line in text.splitlines() if "│" in line]
    assert len(rows) == watch.CURVE_ROWS
    assert rows[0] and len(rows[0]) < width / 4 < 0.6 * len(rows[-1])  # high at the left, low to the right


def test_curve_needs_no_utf8():
    lines = watch.draw_dots([(0, 1.0), (10, 0.0)], 11, 3, utf=False)
    assert lines == ["***", "   *****", "        ***"]
    assert watch.draw_dots([(3, 2.0)], 4, 1, utf=True) == ["⠁⠀⠀⠀"]


def test_without_a_terminal_every_record_is_a_line(tmp_path):
    begin(tmp_path)
    log_loss(tmp_path, 10, 2.0, images_per_second=100.0, memory_gib=1.0, peak_memory_gib=1.0)
    run_log.append_record(tmp_path, "log", 10, eval_accuracy=0.5)
    run_log.append_record(tmp_path, "checkpoint", 10, checkpoint="checkpoint-10")
    run_log.append_record(tmp_path, "end", 10, outcome="finished", reason="")
    assert shown(RunLog(tmp_path), once=False) == (
        "step 0 of 100: training on cpu\nstep 10: loss 2.0000, 100 images/s, 1.00 GiB\n"
        "step 10: validation accuracy 50.00%\nstep 10: checkpoint-10 written\nfinished after step 10\n",
        0,
    )


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_watching_goes_on_until_the_run_has_ended(tmp_path, terminal):
    begin(tmp_path)
    found = []
    watcher = threading.Thread(target=lambda: found.append(shown(RunLog(tmp_path), terminal=terminal, once=False)))
    watcher.start()
    for step in (50, 100):
        log_loss(tmp_path, step, 1.0 / step)
        time.sleep(0.05)
        assert watcher.is_alive()
    run_log.append_record(tmp_path, "end", 100, outcome="failed", reason="the loss is nan")
    watcher.join(timeout=10)
    ((text, code),) = found
    assert "failed after step 100: the loss is nan" in text and code == 1
    assert "step 50: loss 0.0200" in text or terminal


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked and killed")
def test_killed_run_is_noticed(tmp_path):
    def train():
        begin(tmp_path)
        log_loss(tmp_path, 10, 2.0)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    log = RunLog(tmp_path)
    while not log.logs:
        log.read()
    assert watch.get_status(log) == "training"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    text, code = shown(log, once=False)
    assert "ended after step 10 without a record" in text and code == 1


def test_run_on_another_machine_is_not_considered_dead(tmp_path):
    begin(tmp_path, host="another")
    log_loss(tmp_path, 10, 2.0)
    assert "training on another, step 10" in shown(RunLog(tmp_path))[0]


def test_time_left_is_that_of_this_process(tmp_path):
    begin(tmp_path, step=50)
    log = read(tmp_path)
    assert watch.estimate_seconds_left(log) is None
    log.logs.append({"step": 60, "time": log.start["time"] + 20})
    assert watch.estimate_seconds_left(log) == pytest.approx(80)
    assert [watch.format_duration(seconds) for seconds in (5, 65, 7380)] == ["0:05", "1:05", "2:03:00"]


def test_command_shows_a_run_once(tmp_path, capsys):
    begin(tmp_path)
    log_loss(tmp_path, 10, 2.0)
    assert cli.main(["watch", str(tmp_path), "--once"]) == 0
    assert "10/100 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (None, [], "found no folder"),
        ([], [], "found neither a log nor a config.yaml"),
        (["config.yaml", "trainer_state.json"], [], "found one without log.jsonl"),
        (["config.yaml"], ["--interval", "0"], "--interval: expected a number above 0, got 0.0"),
    ],
)
def test_folder_without_a_run_is_one_clear_line(files, options, message, tmp_path, capsys):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    assert cli.main(["watch", str(folder), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
