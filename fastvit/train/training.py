"""What `transformers.Trainer` lacks for fine-tuning: layer-wise learning rates, stopping well and going on exactly as
if nothing had happened, speed and memory in its logs, a progress bar, a log that can be read while it is written."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from huggingface_hub import ModelCard
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback, TrainerState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    IntervalStrategy,
    TrainOutput,
    get_last_checkpoint,
    sort_checkpoints,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from fastvit.checkpoints.configuration import format_error, format_value, is_finite_number, is_integer, read_json
from fastvit.checkpoints.inspection import check_shapes, check_shard_metadata, read_headers
from fastvit.data.images import ImageSet
from fastvit.data.streaming import Stream, build_stream_loader
from fastvit.errors import InputError
from fastvit.files import PARTIAL, remove_folder, sync, wrap_write_errors, write_atomically, write_text
from fastvit.report import run_log
from fastvit.train.distributed import on_any_process


class NonFiniteLoss(InputError):
    """The loss or the gradient became NaN or infinite; training cannot go on."""


class StopOnNonFiniteLoss(TrainerCallback):
    """Ends training before a checkpoint with NaN weights can replace a good one."""

    def on_step_end(self, args, state, control, **kwargs):
        # The loss is looked at before every save. Looking at every step would make a GPU wait at every step.
        if control.should_save:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                last = get_last_checkpoint(args.output_dir)
                raise NonFiniteLoss(
                    f"training: the {name} is {logs[name]} at step {state.global_step}; the last good checkpoint is"
                    f" {last or 'none'}; try a lower --learning-rate, --warmup or --precision fp32"
                )


class EvaluationStopped(Exception):
    """A signal came during an evaluation."""


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C, or the SIGTERM of a scheduler: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    An evaluation is not waited for; `EvaluateWhatIsDue` does it when the run goes on. Before StopOnNonFiniteLoss in the
    list of callbacks, so that it looks at the loss before this checkpoint too. Several processes agree after each step,
    so that all stop after the same one.
    signum: the signal that came, here or to another process, or None.
    """

    def __init__(self):
        self.signum: int | None = None

    def __enter__(self):
        self.previous = {signum: signal.signal(signum, self.handle) for signum in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        if self.signum is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = signum
        name = "interrupted" if signum == signal.SIGINT else f"{signal.Signals(signum).name} received"
        print(f"\n{name}: saving a checkpoint after this step (Ctrl-C to stop at once)", file=sys.stderr)

    def asked_to_stop(self) -> bool:
        """Whether this process or, of several, any was; all must ask at the same point."""
        if on_any_process(self.signum is not None):
            self.signum = self.signum or signal.SIGTERM
        return self.signum is not None

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked_to_stop():
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.asked_to_stop():
            raise EvaluationStopped


class EvaluateWhatIsDue(TrainerCallback):
    """A checkpoint that a signal asked for may lack its evaluation: the run that goes on from it begins with that.

    It also stops again where early stopping had ended the training.
    """

    def __init__(self, trainer: FineTuner):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.eval_strategy != IntervalStrategy.STEPS or state.global_step == 0:
            return
        due = state.global_step % state.eval_steps == 0 or state.global_step >= state.max_steps
        if due and not any(log["step"] == state.global_step and "eval_loss" in log for log in state.log_history):
            self.trainer._determine_best_metric(self.trainer._evaluate(None, None), None)
        self.trainer.find_best_checkpoint()
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                worse = callback.early_stopping_patience_counter
                control.should_training_stop |= worse >= callback.early_stopping_patience


class FollowEpochs(TrainerCallback):
    """Tells the training pictures the epoch, which their random numbers depend on."""

    def __init__(self, pictures: ImageSet):
        self.pictures = pictures

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.pictures.set_epoch(int(state.epoch))


class Meter(TrainerCallback):
    """Images a second since the last reading, without evaluations and checkpoints, and memory, for Trainer's logs."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.restart(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self.restart(state)

    def on_save(self, args, state, control, **kwargs):
        self.restart(state)

    def restart(self, state) -> None:
        self.start, self.start_step = time.perf_counter(), state.global_step

    def read(self, args, state) -> dict[str, float]:
        used, most = memory_bytes(args.device)
        readings = {"memory_gib": used / 2**30, "peak_memory_gib": most / 2**30}
        if state.global_step > self.start_step:  # else it was just restarted
            images = (state.global_step - self.start_step) * self.images_per_step
            readings["images_per_second"] = images / (time.perf_counter() - self.start)
        self.restart(state)
        return readings


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(now, at most since the process began): what PyTorch holds of a GPU; on other devices what the process holds."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return info.rss, info.peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return info.rss, most * (1 if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere


class Progress(ProgressCallback):
    """Trainer's progress bar, with the loss and images a second in it, and a line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "images_per_second" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['images_per_second']:.0f} images/s")
        if "eval_accuracy" in logs:
            result = f"validation accuracy {logs['eval_accuracy']:.2%}, loss {logs['eval_loss']:.3f}"
            self.training_bar.write(f"step {state.global_step}: {result}", file=sys.stdout)

    def close(self) -> None:
        """Take the bars off the terminal, so that nothing is drawn after an error message."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()


class WriteLog(TrainerCallback):
    """Writes `log.jsonl` (`fastvit.report.run_log`), which `fastvit watch` reads; as a context also the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.step = 0
        self.writes = False  # one process of several does

    def append(self, event: str, **values) -> None:
        if self.writes:
            run_log.append_record(self.folder, event, self.step, **values)

    def on_train_begin(self, args, state, control, **kwargs):
        self.writes, self.step = state.is_world_process_zero, state.global_step
        self.append(
            "start",
            max_steps=state.max_steps,
            epochs=state.num_train_epochs,
            device=str(args.device),
            process=run_log.identify_process(),
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.append("log", **logs)

    def on_save(self, args, state, control, **kwargs):
        self.append("checkpoint", checkpoint=f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            self.append("end", outcome="interrupted" if interrupted else "failed", reason=str(error))


class FineTuner(Trainer):
    """Trainer that can be killed at any moment, with a learning rate for each depth.

    Every folder checkpoint-N is whole, and a run that goes on from one ends with the bits of a run that never stopped:
    what Trainer keeps (weights, optimizer, schedule, random numbers, order of the pictures) needs only that pictures
    draw their random numbers for themselves (`ImageSet`) and that evaluations draw none.
    Layer-wise decay: Clark et al. 2020, arXiv:2003.10555.
    keep_checkpoints: how many stay, the newest and the best always; 0: all. Instead of `save_total_limit`, by which
        Trainer deletes them file by file under their names.
    model_card: once set, the text that `create_model_card` (and so `push_to_hub`) writes.
    """

    def __init__(self, *args, layer_decay: float = 1.0, keep_checkpoints: int = 0, **kwargs):
        self.layer_decay = layer_decay
        self.model_card: ModelCard | None = None
        self.keep_checkpoints = keep_checkpoints
        self.checkpoint_home: Path | None = None  # where a checkpoint is written, while it is
        self.meter = Meter()
        super().__init__(*args, **kwargs)
        self.add_callback(self.meter)
        if isinstance(self.train_dataset, ImageSet):
            self.add_callback(FollowEpochs(self.train_dataset))
        self.add_callback(EvaluateWhatIsDue(self))

    def train(self, *args, **kwargs) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        except EvaluationStopped:
            # The step is over, and nothing of its evaluation has been noted.
            if not self.checkpoint_of(self.state.global_step).is_dir():  # else this run goes on from it
                self._save_checkpoint(self.model_wrapped, trial=None)
            return TrainOutput(self.state.global_step, math.nan, {})

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer would take one more step before it looks.
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args, **kwargs):
        return with_lasting_workers(super()._get_dataloader(*args, **kwargs))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a loader of pictures draws a seed for its workers
            return super().evaluate(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self.checkpoint_home is None else str(self.checkpoint_home)

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's checkpoint, written in another folder and moved to its place once it is whole."""
        home = Path(self._get_output_dir(trial))
        checkpoint = home / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = home / PARTIAL / checkpoint.name
        with wrap_write_errors(checkpoint):
            try:
                if self.args.should_save:
                    shutil.rmtree(home / PARTIAL, ignore_errors=True)  # of a process that was killed
                self.accelerator.wait_for_everyone()
                self.checkpoint_home = partial.parent
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(checkpoint)
                if self.args.should_save:
                    self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
                    sync(partial, *partial.rglob("*"))
                    if checkpoint.exists():
                        remove_folder(checkpoint)
                    partial.rename(checkpoint)
                    sync(home)
                    self.remove_old_checkpoints(home)
                self.accelerator.wait_for_everyone()
            finally:
                self.checkpoint_home = None
                if self.args.should_save:
                    shutil.rmtree(home / PARTIAL, ignore_errors=True)

    def remove_old_checkpoints(self, home: Path) -> None:
        """Leave `keep_checkpoints`, among them the newest and the best."""
        checkpoints = sort_checkpoints(str(home))
        old = [folder for folder in checkpoints[:-1] if folder != self.state.best_model_checkpoint]
        if self.keep_checkpoints:
            for folder in old[: max(0, len(checkpoints) - self.keep_checkpoints)]:
                remove_folder(Path(folder))

    def find_best_checkpoint(self) -> None:
        """The best checkpoint where it is now: the run's folder may have been moved."""
        if self.state.best_global_step and (best := self.checkpoint_of(self.state.best_global_step)).is_dir():
            self.state.best_model_checkpoint = str(best)

    def checkpoint_of(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save or self.checkpoint_home is not None:
            super()._save(output_dir, state_dict)
            return
        with write_atomically(Path(output_dir or self.args.output_dir)) as folder:
            super()._save(str(folder), state_dict)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with write_atomically(Path(self.args.output_dir)) as folder:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        write_text(folder / f"{split}_results.json", json.dumps(metrics, indent=4, sort_keys=True))
        if combined:
            path = folder / "all_results.json"
            together = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            write_text(path, json.dumps(together | metrics, indent=4, sort_keys=True))

    def log(self, logs, *args, **kwargs) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self.args, self.state)
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        with unreadable_checkpoint_is_input_error(folder):
            check_trainer_state(folder / TRAINER_STATE_NAME)
            check_shard_metadata(folder)
            if (folder / SAFE_WEIGHTS_NAME).is_file():
                check_shapes(read_headers(folder / SAFE_WEIGHTS_NAME), shapes, folder / SAFE_WEIGHTS_NAME)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with unreadable_checkpoint_is_input_error(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with unreadable_checkpoint_is_input_error(checkpoint):
            super()._load_rng_state(checkpoint)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            # accelerate passes over FSDP where the devices are CPUs. PyTorch does not.
            state = self.accelerator.state
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, Stream):
            return with_lasting_workers(
                build_stream_loader(self.train_dataset, self._train_batch_size, self.args, self.data_collator)
            )
        return super().get_train_dataloader()

    def save_model(self, output_dir=None, _internal_call=False):
        if self.is_fsdp_enabled and _internal_call:
            # Shards are written later. Without their folder some processes would find the best checkpoint, some not;
            # with the config in it, `accelerate merge-weights` makes a model of them.
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            if self.args.should_save:
                self.model.config.save_pretrained(output_dir)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args, **kwargs) -> None:
        if self.model_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_text(Path(self.args.output_dir) / "README.md", str(self.model_card))

    def create_optimizer(self, model=None):
        if self.layer_decay == 1.0 or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = self.layer_decay ** depth_from_top(name, self.model.config.num_hidden_layers)
                weight_decay = self.args.weight_decay if name in decayed else 0.0
                groups.setdefault((scale, weight_decay), []).append(parameter)
        optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {"params": parameters, "lr": self.args.learning_rate * scale, "weight_decay": weight_decay}
                for (scale, weight_decay), parameters in groups.items()
            ],
            **optimizer_kwargs,
        )
        return self.optimizer


@contextlib.contextmanager
def unreadable_checkpoint_is_input_error(folder: str | Path | None) -> Iterator[None]:
    """What Trainer raises for a damaged or hostile checkpoint, of no common class, as one line that names the folder.

    Trainer reads the files there with safetensors or torch's weights_only, which run no code; but for the pickle of a
    sharded checkpoint, which is looked at first.
    """
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # its advice is to run the code
        raise InputError(f"--resume: {folder}: a file is damaged, or holds objects that could run code") from error
    except Exception as error:
        raise InputError(f"--resume: {folder}: cannot be loaded ({format_error(error)})") from error


def check_trainer_state(path: Path) -> None:
    """Whether trainer_state.json holds the numbers that Trainer counts with."""
    state = read_json(path)
    for name in ("global_step", "max_steps"):
        if not is_integer(state.get(name)) or not 0 <= state[name] < 2**53:
            raise InputError(f"{path}: {name}: expected a whole number, got {format_value(state.get(name))}")
    for name in ("epoch", "num_train_epochs"):
        if not is_finite_number(state.get(name)) or state[name] < 0:
            raise InputError(f"{path}: {name}: expected a number, got {format_value(state.get(name))}")
    TrainerState.load_from_json(str(path))


def with_lasting_workers(loader):
    """`loader`, as accelerate made it, with processes that a signal does not end at once."""
    loader.base_dataloader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
    return loader


def start_worker(start: Callable[[int], None] | None, worker_id: int) -> None:
    """What a process that prepares batches does first; `start` is what Trainer has it do.

    Schedulers and terminals send signals to all processes of a run. The main one still needs batches for its last step,
    and ends the others; should it be gone, they end by themselves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(30))
    if start is not None:
        start(worker_id)


def depth_from_top(name: str, num_layers: int) -> int:
    """0 for the head and the final norm, 1 for the last block, num_layers + 1 for the embeddings."""
    if "embeddings." in name:
        return num_layers + 1
    if ".layer." in name:
        return num_layers - int(name.split(".layer.")[1].split(".")[0])
    return 0
