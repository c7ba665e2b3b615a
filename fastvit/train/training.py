"""`transformers.Trainer` with layer-wise learning rates, atomic checkpoints, exact resumption after any interruption,
speed and memory in its logs, one progress bar, and a log file that can be read while it is written."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from huggingface_hub import ModelCard
from torch.optim.lr_scheduler import LambdaLR
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
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from fastvit.adapters.backbones import compute_depths, has_own_names, load_weights
from fastvit.checkpoints.configuration import format_error, format_value, is_finite_number, is_integer, read_json
from fastvit.checkpoints.inspection import check_shapes, check_shard_metadata, read_headers
from fastvit.data.images import ImageSet
from fastvit.data.streaming import Stream, build_stream_loader
from fastvit.errors import InputError
from fastvit.files import PARTIAL, remove_folder, reset_modes, sync, wrap_write_errors, write_atomically, write_text
from fastvit.report import run_log
from fastvit.report.tasks import find_metric
from fastvit.train.distributed import is_set_on_any_process
from fastvit.train.meters import Clock, Meter


class NonFiniteLoss(InputError):
    """The loss or the gradient became NaN or infinite; training cannot continue."""


class StopOnNonFiniteLoss(TrainerCallback):
    """Stops training before a checkpoint with NaN weights can replace a good one."""

    def on_step_end(self, args, state, control, **kwargs):
        # Check the loss before every save. A check at every step would synchronise with the GPU at every step.
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
    """A signal arrived during an evaluation."""


class StopOnInterrupt(TrainerCallback):
    """On Ctrl-C, or a scheduler's SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    An evaluation is aborted; `OverdueEvaluation` repeats it when the run is resumed. Must precede StopOnNonFiniteLoss
    in the list of callbacks, so that the loss is checked before this checkpoint as well. Several processes agree after
    each step, so that all stop after the same one.

    Attributes:
        signum: the signal that arrived, here or at another process, or None.
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

    def is_stop_requested(self) -> bool:
        """Whether a signal has arrived at any process. A collective call."""
        if is_set_on_any_process(self.signum is not None):
            self.signum = self.signum or signal.SIGTERM
        return self.signum is not None

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_stop_requested():
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.is_stop_requested():
            raise EvaluationStopped


class OverdueEvaluation(TrainerCallback):
    """Evaluates when a run is resumed from a checkpoint whose evaluation a signal prevented.

    It also stops a run that early stopping had ended before.
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
                evaluations = callback.early_stopping_patience_counter
                control.should_training_stop |= evaluations >= callback.early_stopping_patience


class EpochSetter(TrainerCallback):
    """Sets the epoch of the training images, which their random numbers depend on."""

    def __init__(self, images: ImageSet):
        self.images = images

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.images.set_epoch(int(state.epoch))


class Progress(ProgressCallback):
    """Trainer's progress bar with the loss and images per second, and a line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "images_per_second" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['images_per_second']:.0f} images/s")
        if (metric := find_metric(logs)) is not None:
            task, value = metric
            result = f"validation {task.metric_name} {task.format_metric(value)}, loss {logs['eval_loss']:.3f}"
            self.training_bar.write(f"step {state.global_step}: {result}", file=sys.stdout)

    def close(self) -> None:
        """Close the bars, so that nothing is drawn after an error message."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()


class RunLogWriter(TrainerCallback):
    """Writes `log.jsonl` (`fastvit.report.run_log`), which `fastvit watch` reads; as a context, also errors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.step = 0
        self.is_writer = False  # one of several processes is

    def append(self, event: str, **values) -> None:
        if self.is_writer:
            run_log.append_record(self.folder, event, self.step, **values)

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_writer, self.step = state.is_world_process_zero, state.global_step
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
    """Trainer that can be killed at any moment, with layer-wise learning rates.

    Every folder checkpoint-N is complete, and a resumed run has the same bits as an uninterrupted one. Trainer stores
    weights, optimizer, schedule, random numbers and the order of the images. In addition, images draw random numbers of
    their own (`ImageSet`), and evaluations draw none.

    Args:
        layer_decay: learning rate of a block relative to the block above (Clark et al. 2020, arXiv:2003.10555).
        keep_checkpoints: number of checkpoints to keep, always with the newest and the best; 0 keeps all. It replaces
            `save_total_limit`, with which Trainer deletes a checkpoint file by file under its own name.

    Attributes:
        model_card: once set, written by `create_model_card`, and so by `push_to_hub`.
    """

    def __init__(self, *args, layer_decay: float = 1.0, keep_checkpoints: int = 0, **kwargs):
        self.layer_decay = layer_decay
        self.model_card: ModelCard | None = None
        self.keep_checkpoints = keep_checkpoints
        self.checkpoint_home: Path | None = None  # folder of the checkpoint that is being written
        self.meter = Meter()
        super().__init__(*args, **kwargs)
        self.add_callback(self.meter)
        self.add_callback(Clock())
        if isinstance(self.train_dataset, ImageSet):
            self.add_callback(EpochSetter(self.train_dataset))
        self.add_callback(OverdueEvaluation(self))

    def train(self, *args, **kwargs) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        except EvaluationStopped:
            # The step is complete, and its evaluation has left nothing in the state.
            if not self.get_checkpoint_dir(self.state.global_step).is_dir():  # else this run was resumed from it
                self._save_checkpoint(self.model_wrapped, trial=None)
            return TrainOutput(self.state.global_step, math.nan, {})

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer would train one more step before it checks.
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args, **kwargs):
        return protect_workers(super()._get_dataloader(*args, **kwargs))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a data loader draws a seed for its workers
            return super().evaluate(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self.checkpoint_home is None else str(self.checkpoint_home)

    def _save_checkpoint(self, model, trial) -> None:
        """Write Trainer's checkpoint in another folder, and rename it once it is complete."""
        home = Path(self._get_output_dir(trial))
        checkpoint = home / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = home / PARTIAL / checkpoint.name
        with wrap_write_errors(checkpoint):
            try:
                if self.args.should_save:
                    shutil.rmtree(home / PARTIAL, ignore_errors=True)  # left by a process that was killed
                self.accelerator.wait_for_everyone()
                self.checkpoint_home = partial.parent
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(checkpoint)
                if self.args.should_save:
                    self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
                    reset_modes(partial)
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
        """Keep `keep_checkpoints` checkpoints, among them the newest and the best."""
        checkpoints = sort_checkpoints(str(home))
        old = [folder for folder in checkpoints[:-1] if folder != self.state.best_model_checkpoint]
        if self.keep_checkpoints:
            for folder in old[: max(0, len(checkpoints) - self.keep_checkpoints)]:
                remove_folder(Path(folder))

    def find_best_checkpoint(self) -> None:
        """Update the path of the best checkpoint: the folder of the run may have been moved."""
        if self.state.best_global_step and (best := self.get_checkpoint_dir(self.state.best_global_step)).is_dir():
            self.state.best_model_checkpoint = str(best)

    def get_checkpoint_dir(self, step: int) -> Path:
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
        if "train_runtime" in logs:
            self.include_earlier_starts(logs)
        super().log(logs, *args, **kwargs)

    def include_earlier_starts(self, metrics: dict[str, float]) -> None:
        """Replace the time and speed of this start by those of the whole run, if it was resumed."""
        clock = self.find_callback(Clock)
        if clock.earlier:
            seconds, steps = clock.read(), self.state.global_step
            metrics["train_runtime"] = round(seconds, 4)
            metrics["train_steps_per_second"] = round(steps / seconds, 3)
            metrics["train_samples_per_second"] = round(steps * self.meter.images_per_step / seconds, 3)

    def find_callback(self, kind: type) -> Any:
        return next((one for one in self.callback_handler.callbacks if isinstance(one, kind)), None)

    def _init_training_state(self, max_steps, *args, **kwargs):
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint has those of its run
        return position

    def _load_callback_state(self) -> None:
        # A checkpoint has the arguments of its callbacks besides their state.
        stopping = self.find_callback(EarlyStoppingCallback)
        super()._load_callback_state()
        if stopping is not None:
            restored = self.find_callback(EarlyStoppingCallback)
            restored.early_stopping_patience = stopping.early_stopping_patience
        clock = self.find_callback(Clock)
        if not is_finite_number(clock.earlier):  # a damaged file
            clock.earlier = 0.0

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        with report_unreadable_checkpoint(folder):
            check_trainer_state(folder / TRAINER_STATE_NAME)
            check_shard_metadata(folder)
            if (folder / SAFE_WEIGHTS_NAME).is_file():
                check_shapes(read_headers(folder / SAFE_WEIGHTS_NAME), shapes, folder / SAFE_WEIGHTS_NAME)
            check_class_names(folder / CONFIG_NAME, self.model.config.id2label)
            if has_own_names(self.model) and (folder / SAFE_WEIGHTS_NAME).is_file():
                load_weights(self.model, folder)  # Trainer would skip the tensors of other names
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint or "")
        if has_own_names(self.model) and (folder / SAFE_WEIGHTS_NAME).is_file():
            load_weights(self.model, folder)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint):
        given = [dict(group, params=None) for group in self.optimizer.param_groups]
        with report_unreadable_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # The options of this start take precedence over those in the checkpoint.
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        for group, before in zip(groups, given, strict=True):
            group["weight_decay"] = before["weight_decay"]
        if isinstance(scheduler, LambdaLR):  # the others set the rate by the evaluations before
            scheduler.base_lrs = [before["initial_lr"] for before in given]
            for group, rate, schedule in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = rate, rate * schedule(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # otherwise fp16 was given up, with its scale of the loss
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with report_unreadable_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            # accelerate ignores FSDP on CPUs; PyTorch supports it.
            state = self.accelerator.state
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, Stream):
            return protect_workers(
                build_stream_loader(self.train_dataset, self._train_batch_size, self.args, self.data_collator)
            )
        return super().get_train_dataloader()

    def save_model(self, output_dir=None, _internal_call=False):
        if self.is_fsdp_enabled and _internal_call:
            # The shards are written later. The folder must exist before, or only some processes find the best
            # checkpoint. With the config in it, `accelerate merge-weights` can merge the shards into a model.
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
        depths = compute_depths(model)
        groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self.layer_decay ** depths[name], name in decayed), []).append(parameter)
        optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate * scale,
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                }
                for (scale, is_decayed), parameters in groups.items()
            ],
            **optimizer_kwargs,
        )
        return self.optimizer


@contextlib.contextmanager
def report_unreadable_checkpoint(folder: str | Path | None) -> Iterator[None]:
    """Report the errors of a damaged or hostile checkpoint, which have no common class, as one line with its folder.

    Trainer reads the files with safetensors or torch's weights_only, which run no code. The exception is the pickle of
    a sharded checkpoint, which `check_shard_metadata` checks first.
    """
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # PyTorch's message advises to run the code
        raise InputError(f"--resume: {folder}: a file is damaged, or holds objects that could run code") from error
    except Exception as error:
        raise InputError(f"--resume: {folder}: cannot be loaded ({format_error(error)})") from error


def check_trainer_state(path: Path) -> None:
    """Check the numbers of trainer_state.json that Trainer computes with.

    Raises:
        InputError: a number is missing, or has another type or range.
    """
    state = read_json(path)
    for name in ("global_step", "max_steps"):
        if not is_integer(state.get(name)) or not 0 <= state[name] < 2**53:
            raise InputError(f"{path}: {name}: expected a whole number, got {format_value(state.get(name))}")
    for name in ("epoch", "num_train_epochs"):
        if not is_finite_number(state.get(name)) or state[name] < 0:
            raise InputError(f"{path}: {name}: expected a number, got {format_value(state.get(name))}")
    TrainerState.load_from_json(str(path))


def check_class_names(config: Path, names: dict[int, str]) -> None:
    """Check that a checkpoint was trained with the same classes in the same order.

    Args:
        config: its config.json, which need not exist.
        names: the classes of the images.

    Raises:
        InputError: a class differs.
    """
    stored = read_json(config).get("id2label") if config.is_file() else None
    if isinstance(stored, dict) and stored != {str(label): name for label, name in names.items()}:
        raise InputError(
            f"--resume: the run has the classes {', '.join(map(str, stored.values()))[:200]}; the images have"
            f" {', '.join(names.values())[:200]}"
        )


def protect_workers(loader):
    """Let the worker processes of a loader made by accelerate survive the signals that stop a run."""
    loader.base_dataloader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
    return loader


def start_worker(start: Callable[[int], None] | None, worker_id: int) -> None:
    """Initialise a worker process that prepares batches.

    Schedulers and terminals send signals to all processes of a run. The main process still needs batches for its last
    step, and then ends the workers. If it is gone, they end by themselves after 30 seconds.

    Args:
        start: Trainer's own initialisation.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(30))
    if start is not None:
        start(worker_id)
