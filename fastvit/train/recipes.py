"""Recipes that can improve a model, each an option of `fastvit finetune`.

images        RandAugment, mixup, cutmix
targets       the loss for mixed labels, label smoothing and unbalanced classes
weights       their moving average, low-rank adapters
predictions   the mean over an image and its mirror image
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, default_data_collator

from fastvit.adapters.backbones import find_lora_targets
from fastvit.data.images import seed_rng
from fastvit.errors import InputError
from fastvit.files import reset_modes
from fastvit.train.training import FineTuner


def require(library: str, extra: str, option: str) -> Any:
    """Import the module `library`.

    Raises:
        InputError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise InputError(f"{option}: needs {error.name or library}: pip install 'fastvit[{extra}]'") from None


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def build_policy(magnitude: int) -> list[list[tuple[str, float, float]]]:
    """The operations of RandAugment in kornia's form: a name, and the values at magnitude 0 and 30.

    kornia's own policy, like the paper's code, runs from dark to bright and from solarised to not, so that magnitude 15
    changes nothing and 1 almost everything. Here a larger magnitude is a larger change. An operation with two
    directions is two operations, and a falling value is fixed for this magnitude: kornia accepts no falling range.
    """
    strength = magnitude / 30
    rising = {"color": 0.9, "contrast": 0.9, "brightness": 0.5, "sharpness": 0.9}  # kornia's brightness is a sum
    falling = {"solarize": 1 - strength, **{name: 1 - reach * strength for name, reach in rising.items()}}
    return [
        *([(name, 0.0, 1.0)] for name in ("auto_contrast", "equalize", "invert")),
        *([(name, -0.3, 0.3)] for name in ("shear_x", "shear_y")),
        *([(name, -0.1, 0.1)] for name in ("translate_x", "translate_y")),
        [("rotate", -30.0, 30.0)],
        [("posterize", 4.0, 8.0)],
        [("solarize_add", 0.0, 0.43)],
        *([(name, 1.0, 1 + reach)] for name, reach in rising.items()),
        *([(name, value, value)] for name, value in falling.items()),
    ]


class RandAugment:
    """Random operations of one magnitude on an image (Cubuk et al. 2020, arXiv:1909.13719), computed by kornia.

    Args:
        operations: number of operations per image.
        magnitude: above 0 and below 30.
        first: augmentation that is applied before.
    """

    def __init__(self, operations: int, magnitude: int, first: Callable[[np.ndarray], np.ndarray] | None = None):
        auto = require("kornia.augmentation.auto", "augment", "--randaugment")
        self.augment = auto.RandAugment(operations, magnitude, build_policy(magnitude))
        self.first = first

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Augment an image: uint8 `[h, w, 3]` -> uint8 `[height, width, 3]`, the size of `first`."""
        if self.first is not None:
            image = self.first(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        pixels = self.augment(pixels)[0].permute(1, 2, 0)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()


class ImageMixer:
    """Data collator that mixes the images and labels of a batch, if its entries have a seed.

    Mixup: x = a x1 + (1 - a) x2 with one a per batch from Beta(mixup, mixup) (Zhang et al. 2018, arXiv:1710.09412).
    Cutmix: a box of x2 in x1, with one a per image from Beta(cutmix, cutmix) (Yun et al. 2019, arXiv:1905.04899),
    computed by kornia, whose mixup has only the uniform distribution. With both, each batch uses one at random. Labels
    become float `[B, classes]`: the share of each class in the image.
    """

    def __init__(self, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0):
        self.num_classes, self.mixup, self.cutmix = num_classes, mixup, cutmix
        if cutmix:
            self.paste = require("kornia.augmentation", "augment", "--cutmix").RandomCutMixV2(
                beta=cutmix, data_keys=["input", "class"], use_correct_lambda=True
            )

    def __call__(self, entries: list[dict[str, Any]]) -> dict[str, Tensor]:
        seeds = [entry["seed"] for entry in entries if "seed" in entry]
        batch = default_data_collator([{k: v for k, v in entry.items() if k != "seed"} for entry in entries])
        if not seeds:
            return batch
        with seed_rng(int(np.random.SeedSequence(seeds).generate_state(1)[0])):
            pixels, labels = batch["pixel_values"], batch["labels"]
            if self.cutmix and not (self.mixup and torch.rand(()) < 0.5):
                pixels, labels = self.cut_and_paste(pixels, labels)
            else:
                pixels, labels = self.blend(pixels, labels)
        return {**batch, "pixel_values": pixels, "labels": labels}

    def blend(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup: images uint8 `[B, H, W, 3]`, labels int64 `[B]` -> uint8 `[B, H, W, 3]`, float `[B, classes]`."""
        share = torch.distributions.Beta(self.mixup, self.mixup).sample()
        order = torch.randperm(len(labels))
        mixed = torch.lerp(pixels[order].float(), pixels.float(), share)
        targets = F.one_hot(labels, self.num_classes).float()
        return mixed.round().to(torch.uint8), torch.lerp(targets[order], targets, share)

    def cut_and_paste(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cutmix, with the shapes and dtypes of `blend`."""
        mixed, mixes = self.paste(pixels.permute(0, 3, 1, 2).float(), labels)
        own, other, share = mixes[0].unbind(-1)  # [B] each
        own, other = (F.one_hot(classes.long(), self.num_classes).float() for classes in (own, other))
        return mixed.permute(0, 2, 3, 1).to(torch.uint8), torch.lerp(other, own, share[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------------


class TargetLoss:
    """Trainer's loss function: cross-entropy with class weights and label smoothing.

    The loss of an image is the sum over the classes of weight x target x -log(probability), that of a batch the mean
    over its images.

    Args:
        class_weights: float `[classes]`, with a mean of 1 over the training images.
        label_smoothing: share of the target spread over all classes.
    """

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0):
        self.class_weights, self.label_smoothing = class_weights, label_smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            outputs: with "logits", float `[B, classes]`.
            labels: int64 `[B]`, or targets float `[B, classes]`.
            num_items_in_batch: number of elements of the labels of the whole step, over all batches and devices.
        """
        losses = self.compute_losses(outputs["logits"], labels)
        if num_items_in_batch is None:
            return losses.mean()
        return losses.sum() * (labels.numel() // len(labels)) / num_items_in_batch

    def compute_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image: logits `[B, classes]` -> float32 `[B]`."""
        targets = F.one_hot(labels, logits.shape[-1]) if labels.dim() == 1 else labels
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        logits = logits.float()
        return F.cross_entropy(
            logits, targets.to(logits.dtype), weights, reduction="none", label_smoothing=self.label_smoothing
        )


def compute_class_weights(counts: np.ndarray, beta: float) -> Tensor:
    """Class weights by the inverse of the effective number of images, (1 - beta^n) / (1 - beta) for n images.

    Cui et al. 2019, arXiv:1901.05555. Beta 0 weights all classes equally, beta 1 by the inverse of n.

    Args:
        counts: int `[classes]`, training images per class.
        beta: from 0 to 1.

    Returns:
        float32 `[classes]`, with a mean of 1 over the training images.
    """
    counts = np.asarray(counts, dtype=np.float64)
    effective = counts if beta == 1 else -np.expm1(counts * np.log(beta)) / (1 - beta) if beta else np.ones_like(counts)
    weights = np.divide(1, effective, out=np.zeros_like(counts), where=counts > 0)
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------

AVERAGE_FILE = "average.pt"  # in a checkpoint, beside optimizer.pt


class AverageUpdater(TrainerCallback):
    def __init__(self, trainer: RecipeTuner):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.average is None:
            self.trainer.start_average()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.average.update_parameters(self.trainer.model)


class RecipeTuner(FineTuner):
    """FineTuner with a moving average of the weights, and predictions over mirror images.

    Args:
        ema_decay: d in average = d x average + (1 - d) x weights after every step. The average is evaluated, selects
            the best checkpoint, and becomes the model's weights at the end. Checkpoints hold both.

    Attributes:
        flip: predict the mean of the logits for an image and its mirror image; may be set at any time.
    """

    def __init__(self, *args, ema_decay: float | None = None, **kwargs):
        self.ema_decay, self.flip = ema_decay, False
        self.average: AveragedModel | None = None
        super().__init__(*args, **kwargs)
        if ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise InputError("--ema: expected unsharded weights on every device, got sharded weights")
            self.add_callback(AverageUpdater(self))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ema_decay is not None and checkpoint is not None:
            self.start_average()
            self.load_average(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            torch.save(self.average.state_dict(), Path(output_dir) / AVERAGE_FILE)

    def start_average(self) -> None:
        """Start the average once the model is on its device; the first update sets it to the weights."""
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay))

    def load_average(self, checkpoint: str) -> None:
        assert self.average is not None
        path = Path(checkpoint) / AVERAGE_FILE
        if not path.exists():
            raise InputError(f"--ema: expected a checkpoint with {AVERAGE_FILE}, found none in {checkpoint}")
        self.average.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.load_average(self.state.best_model_checkpoint)

    def train(self, *args, **kwargs):
        self.average = None  # a sweep calls train once per trial
        result = super().train(*args, **kwargs)
        if self.average is not None:
            copy_weights(self.average.module, self.model)
        return result

    def evaluate(self, *args, **kwargs):
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context in which the model has the moving average of its weights, if there is one."""
        if self.average is None:
            yield
            return
        own = [parameter.detach().clone() for parameter in self.model.parameters()]
        copy_weights(self.average.module, self.model)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), own, strict=True):
                    parameter.copy_(value)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.flip and logits is not None:
            mirrored = {**inputs, "pixel_values": inputs["pixel_values"].flip(2)}  # [B, H, W, 3]
            logits = (logits + super().prediction_step(model, mirrored, prediction_loss_only, ignore_keys)[1]) / 2
            compute_loss = self.compute_loss_func or TargetLoss(label_smoothing=self.args.label_smoothing_factor)
            loss = compute_loss({"logits": logits}, labels)
        return loss, logits, labels


@torch.no_grad()
def copy_weights(source: torch.nn.Module, destination: torch.nn.Module) -> None:
    for value, parameter in zip(source.parameters(), destination.parameters(), strict=True):
        parameter.copy_(value)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def add_adapters(model: Any, rank: int) -> Any:
    """Add low-rank adapters to query and value of every block with peft (Hu et al. 2021, arXiv:2106.09685).

    Only the adapters and the classifier are trained.
    """
    peft = require("peft", "lora", "--lora")
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=find_lora_targets(model), modules_to_save=["classifier"]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft uses a deprecated name
        return peft.get_peft_model(model, config)


def merge_adapters(trainer: RecipeTuner, folder: Path) -> None:
    """Write the adapters to `folder`, and merge them into the trainer's model."""
    if trainer.args.should_save:
        trainer.model.save_pretrained(folder)
        reset_modes(folder)
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
