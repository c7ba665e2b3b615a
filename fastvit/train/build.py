"""Build images, model, loss and Trainer's arguments from the options."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerState, TrainingArguments, ViTConfig, ViTImageProcessorPil
from transformers.trainer import TRAINER_STATE_NAME

from fastvit.adapters.backbones import build_classifier, check_image_size
from fastvit.checkpoints.configuration import make_pair
from fastvit.checkpoints.hub import skip_unreachable_hub
from fastvit.data.datasets import TRAIN, ImageDataset, load_images
from fastvit.data.images import MEMORY_CACHE_BYTES, Augment, ImageSet, cache_images
from fastvit.data.streaming import Stream, StreamedDataset, stream_images
from fastvit.data.targets import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from fastvit.errors import InputError
from fastvit.models.backbone import FAMILIES, get_vision_config
from fastvit.models.heads import ViTForImageClassification
from fastvit.models.loading import (
    load_config,
    load_image_settings,
    load_pretrained,
    read_image_settings,
    read_model_type,
)
from fastvit.report.tasks import TASKS
from fastvit.serve.preprocessing import load_preprocessor
from fastvit.train.folds import select_fold
from fastvit.train.objectives import LabelLoss, NumberHead, NumberLoss, compute_spread
from fastvit.train.options import SIZES, FinetuneOptions
from fastvit.train.recipes import RandAugment, TargetLoss, add_adapters, compute_class_weights
from fastvit.train.run_folder import find_last_checkpoint

REMEDY = "without a network use --model FOLDER (a checkpoint on this machine) or --from-scratch SIZE"


def load_data(options: FinetuneOptions, processes: PartialState) -> ImageDataset:
    """Load the images that the options name; with --fold, one of the folds for validation."""
    is_on_hub = options.dataset not in (None, "generated")
    with skip_unreachable_hub() if is_on_hub else contextlib.nullcontext():
        return read_data(options, processes)


def read_data(options: FinetuneOptions, processes: PartialState) -> ImageDataset:
    if options.streaming:
        return stream_images(
            options.dataset,
            options.data_dir,
            labels_file=options.labels,
            image_column=options.image_column,
            label_column=options.label_column,
            class_names=options.class_names,
            max_eval_samples=options.max_eval_samples,
            seed=options.seed,
            need_length=options.max_steps <= 0,
            need_validation=options.validation_fraction != 0,
            channels=options.channels,
        )
    with processes.local_main_process_first():
        images = load_images(
            options.dataset,
            options.data_dir,
            labels_file=options.labels,
            image_column=options.image_column,
            label_column=options.label_column,
            task=options.task or "auto",
            validation_fraction=options.validation_fraction if options.fold is None else 0,
            seed=options.seed,
            image_size=max(make_pair(options.image_size or 64)),
            generated_images=options.generated_images,
            channels=options.channels,
        )
    if options.folds is None or options.fold is None:
        return images
    return select_fold(images, options.folds, options.fold, options.seed)


def print_counts(images: ImageDataset) -> None:
    """Print a table of images per class and split, or of the means of numbers."""
    task = TASKS[images.task]
    heading = {REGRESSION: "mean of", MULTI_LABEL: "label"}.get(images.task, "class")
    width = max(len(name) for name in [*images.class_names, heading])
    print(f"{images.name}: {len(images.class_names)} {task.noun}")
    print(f"  {heading:<{width}}" + "".join(f"{name:>12}" for name in images.splits))
    counts, cell = images.count_labels(), "12.6g" if images.task == REGRESSION else "12d"
    for label, class_name in list(enumerate(images.class_names))[:50]:
        print(f"  {class_name:<{width}}" + "".join(f"{count[label]:>{cell}}" for count in counts.values()))
    if len(images.class_names) > 50:
        print(f"  ... and {len(images.class_names) - 50} more {task.noun}")
    print(
        f"  {'images' if images.task == REGRESSION else 'total':<{width}}"
        + "".join(f"{len(split):>12}" for split in images.splits.values())
    )
    for note in images.notes:
        print(f"note: {note}")


def describe_count(images: ImageDataset) -> str:
    """The number of training images for a sentence, or "streamed"."""
    return "streamed" if isinstance(images, StreamedDataset) else f"{len(images.splits[TRAIN]):,}"


def choose_decode_size(size: tuple[int, int], augment: Augment | None) -> tuple[int, int]:
    """Images that are cropped randomly are decoded larger by 1/7, so that crops keep their detail."""
    return (math.ceil(size[0] * 8 / 7), math.ceil(size[1] * 8 / 7)) if augment else size


def build_image_sets(
    options: FinetuneOptions, images: ImageDataset, processor: ViTImageProcessorPil, processes: PartialState
) -> dict[str, ImageSet]:
    """Decode and cache every split. The first process of a machine writes the cache, and all of them read it.

    Raises:
        InputError: an image cannot be decoded and --skip-bad-images is off, or a split has no image left.
    """
    size = (processor.size["height"], processor.size["width"])
    cache_home = Path(os.environ.get("FASTVIT_CACHE_DIR") or Path.home() / ".cache" / "fastvit")
    sets = {}
    for name, split in images.splits.items():
        limit = options.max_train_samples if name == TRAIN else options.max_eval_samples
        if limit is not None and limit < len(split):
            split = split.select(np.sort(np.random.default_rng(options.seed).permutation(len(split))[:limit]))
        crop = Augment(size) if name == TRAIN and options.augment else None
        with processes.local_main_process_first():
            cache = cache_images(
                split.load,
                len(split),
                choose_decode_size(size, crop),
                channels=options.channels,
                resample=processor.resample,
                skip_bad=options.skip_bad_images,
                key=split.key,
                cache_dir=cache_home / "images",
                memory_limit=MEMORY_CACHE_BYTES if processes.num_processes == 1 else 0,
                description=f"decoding {name}",
            )
        if cache.skipped:
            print(f"{name}: {len(cache.skipped)} of {len(split)} images skipped:")
            for reason in list(cache.skipped.values())[:10]:
                print(f"  {reason}")
        augment: Augment | RandAugment | None = crop
        if name == TRAIN and options.randaugment is not None:
            operations, magnitude = options.randaugment
            augment = RandAugment(operations, magnitude, first=crop)
        with_seeds = name == TRAIN and bool(options.mixup or options.cutmix)
        sets[name] = ImageSet(
            cache, split.labels, augment, seed=options.seed, with_seeds=with_seeds, get_name=split.get_name
        )
        if len(sets[name]) == 0:
            raise InputError(f"{images.name}: no image left in split {name!r}")
    return sets


def build_stream(
    options: FinetuneOptions, images: StreamedDataset, processor: ViTImageProcessorPil, processes: PartialState
) -> Stream:
    """The training images of this process; with --resume, those after the last checkpoint."""
    size = (processor.size["height"], processor.size["width"])
    augment = Augment(size) if options.augment else None
    stream = Stream(
        images,
        choose_decode_size(size, augment),
        augment,
        resample=processor.resample,
        seed=options.seed,
        shuffle_buffer=options.shuffle_buffer,
        skip_bad=options.skip_bad_images,
        rank=processes.process_index,
        world_size=processes.num_processes,
    )
    if options.resume and (checkpoint := find_last_checkpoint(options.output_dir)):
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        stream.resume_after(state.global_step * options.gradient_accumulation, options.batch_size)
    return stream


def load_model(options: FinetuneOptions, class_names: list[str], task: str = SINGLE_LABEL) -> Any:
    """Load or initialise the model, with a classifier for `class_names`. A ViT with its usual pool is our own model.

    Raises:
        InputError: the checkpoint cannot be loaded, or the image size is no multiple of the patch size.
    """
    model = load_any_model(options, class_names, task)
    for name in ("label_thresholds", "calibration_temperature"):  # of the classifier that the checkpoint had
        if getattr(model.config, name, None) is not None:
            setattr(model.config, name, None)
    return model


def load_any_model(options: FinetuneOptions, class_names: list[str], task: str) -> Any:
    classes = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "problem_type": TASKS[task].problem_type,
    }
    labels = {
        **classes,
        "attention_probs_dropout_prob": options.attention_dropout,
        "hidden_dropout_prob": options.hidden_dropout,
        "drop_path_rate": options.drop_path,
    }
    if options.from_scratch is not None:
        hidden_size, num_layers, num_heads = SIZES[options.from_scratch]
        image_size = options.image_size or 224
        if any(side % options.patch_size for side in make_pair(image_size)):
            raise InputError(
                f"--image-size: expected a multiple of the patch size {options.patch_size}, got {image_size}"
            )
        config = ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * hidden_size,
            image_size=image_size,
            patch_size=options.patch_size,
            encoder_stride=options.patch_size,
            layer_norm_eps=1e-6,
            num_channels=options.channels,
            **labels,
        )
        return ViTForImageClassification(config)

    if not is_plain_vit(options):
        if options.channels != 3:
            raise InputError(
                f"--channels: expected 3 for {options.model}, got {options.channels}; other channels need a ViT that is"
                " classified by its class token, or --from-scratch"
            )
        return build_classifier(
            options.model,
            classes,
            pool=options.pool,
            image_size=options.image_size,
            default_image_size=read_default_size(options.model),
            drop_path=options.drop_path,
            hidden_dropout=options.hidden_dropout,
            attention_dropout=options.attention_dropout,
        )
    config = load_config(options.model, REMEDY)
    config.update(labels)
    if options.image_size is not None:
        config.image_size = options.image_size
        check_image_size(options.image_size, config.patch_size)
    if config.num_channels not in (3, options.channels):
        expected = f"{config.num_channels}, those of {options.model}"
        raise InputError(f"--channels: expected {expected}, got {options.channels}")
    # The classifier alone may have other shapes, for other classes.
    loaded = load_pretrained(options.model, ignore_mismatched_sizes=True, config=config)
    if config.num_channels != options.channels:
        adapt_channels(loaded, options.channels)
    return loaded


@torch.no_grad()
def adapt_channels(model: ViTForImageClassification, channels: int) -> None:
    """Give a model of RGB images other channels, as timm does.

    For one channel the weights of the patch embedding are summed over red, green and blue, as grey images are three
    equal channels. For others, those of red, green and blue are repeated in turn, and scaled by 3 / channels.
    """
    embeddings = model.vit.embeddings.patch_embeddings
    weight = embeddings.projection.weight  # [D, 3, h, w]
    repeated = weight[:, torch.arange(channels) % 3] * (3 / channels)
    adapted = weight.sum(1, keepdim=True) if channels == 1 else repeated
    embeddings.projection.weight = torch.nn.Parameter(adapted)
    embeddings.projection.in_channels = embeddings.num_channels = model.config.num_channels = channels


def has_statistics(options: FinetuneOptions) -> bool:
    """Whether the checkpoint has a mean and a deviation for images of these channels."""
    return options.from_scratch is None and (
        options.channels == 3 or load_config(options.model, REMEDY).num_channels == options.channels
    )


def set_statistics(
    options: FinetuneOptions, images: ImageDataset, sets: dict[str, ImageSet], processor: ViTImageProcessorPil
) -> None:
    """Normalise images of other channels than the checkpoint's by the mean and deviation of 1,000 training images."""
    if options.channels == 3 or has_statistics(options):
        return
    if TRAIN in sets:
        chosen = sets[TRAIN].indices[:: max(1, len(sets[TRAIN]) // 1000)]
        pixels = (np.asarray(sets[TRAIN].images[index]) for index in chosen)
    else:
        split = images.load_example_split()
        pixels = (np.asarray(split.load(index)) for index in range(len(split)))
    moments = [((each / 255).mean((0, 1)), np.square(each / 255).mean((0, 1))) for each in pixels]
    mean, square = np.mean(moments, axis=0)
    deviation = np.sqrt(np.maximum(square - mean**2, 255.0**-2))  # at least one step of 8 bits
    processor.image_mean, processor.image_std = mean.tolist(), deviation.tolist()


def is_plain_vit(options: FinetuneOptions) -> bool:
    """Whether the model is a ViT classified by its class token, from a checkpoint or from scratch."""
    return options.from_scratch is not None or (
        options.pool in (None, "cls") and read_model_type(options.model, REMEDY) == "vit"
    )


def read_default_size(model: str) -> tuple[int, int] | None:
    """The size of the images that the image processor of a checkpoint returns, if there is one."""
    return None if read_image_settings(model) is None else load_preprocessor(model).image_size


def load_image_processor(options: FinetuneOptions, model: Any) -> ViTImageProcessorPil:
    """The image processor of the model: the normalisation and resampling of its checkpoint, at the size of training.

    Whole images are resized, also where the checkpoint's image processor crops them.
    """
    size = get_vision_config(model.config).image_size
    settings: dict[str, Any] = {}
    if not is_plain_vit(options):
        size = options.image_size or read_default_size(options.model) or size
        if read_image_settings(options.model) is None:
            family = FAMILIES[get_vision_config(model.config).model_type]
            family = FAMILIES.get(read_model_type(options.model), family)
            mean, std = (list(values) for values in family.normalization)
            settings = {"image_mean": mean, "image_std": std}
            print(
                f"note: {options.model} has no image processor; using {family.name}'s mean {mean} and deviation {std}"
            )
        else:
            before = load_preprocessor(options.model)
            settings = {"image_mean": list(before.mean), "image_std": list(before.std), "resample": before.resample}
    elif has_statistics(options):
        base = load_image_settings(options.model, model.config)
        if base is None:
            print(f"note: {options.model} has no image processor; using mean and standard deviation 0.5")
        else:
            settings = {"image_mean": list(base[0]), "image_std": list(base[1]), "resample": base[3]}
    return ViTImageProcessorPil(size=dict(zip(("height", "width"), make_pair(size), strict=True)), **settings)


def prepare_model(options: FinetuneOptions, model: Any, spread: tuple[np.ndarray, np.ndarray] | None = None) -> Any:
    """Freeze the backbone, recompute activations or add adapters, as the options say; returns the model to train.

    Args:
        spread: mean and standard deviation of the targets of a regression.
    """
    if spread is not None:
        model.classifier = NumberHead(model.classifier, *spread)
    if options.freeze_backbone:
        for name, parameter in model.named_parameters():
            if not name.startswith("classifier."):
                parameter.requires_grad_(False)
    if options.gradient_checkpointing:
        # Newer versions of transformers 5 have renamed the method.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model if options.lora is None else add_adapters(model, options.lora)


def choose_precision(options: FinetuneOptions, hidden_size: int) -> str:
    """bf16, fp16 or fp32. "auto" is bf16 where that is faster: on most GPUs, for wide models on CPUs that have it."""
    if options.precision != "auto":
        return options.precision
    if torch.cuda.is_available() and not options.cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Below a hidden size of about 192 the casts cost more time than the matmuls save.
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = found.get("amx_bf16", False) or found.get("avx512_bf16", False)
    return "bf16" if has_bf16 and hidden_size >= 192 else "fp32"


def build_loss(
    options: FinetuneOptions,
    train: ImageSet | None,
    num_classes: int,
    has_own_loss: bool = True,
    task: str = SINGLE_LABEL,
) -> TargetLoss | None:
    """The loss for class weights, mixed or other labels; None for the model's own loss with Trainer's label smoothing.

    Args:
        has_own_loss: whether the model's own loss counts the images of all batches of a step. Those of BEiT, CLIP and
            SigLIP in transformers do not, although Trainer assumes it.
        task: what the model predicts.
    """
    if task != SINGLE_LABEL:
        assert train is not None
        return LabelLoss() if task == MULTI_LABEL else NumberLoss(compute_spread(train.labels)[1])
    weights = None
    if options.class_balanced is not None and train is not None:
        weights = compute_class_weights(np.bincount(train.labels, minlength=num_classes), options.class_balanced)
    elif has_own_loss and not (options.mixup or options.cutmix):
        return None
    return TargetLoss(weights, options.label_smoothing)


def count_steps(options: FinetuneOptions, images: ImageDataset, processes: PartialState) -> int:
    """Number of steps to train; -1 for that of --epochs. A stream has no length, so its steps are computed here."""
    if options.max_steps > 0 or not isinstance(images, StreamedDataset) or images.num_train is None:
        return options.max_steps
    images_per_step = options.batch_size * options.gradient_accumulation * processes.num_processes
    return math.ceil(options.epochs * images.num_train / images_per_step)


def build_training_arguments(
    options: FinetuneOptions,
    precision: str,
    has_validation: bool,
    max_steps: int,
    block_class: str,
    task: str = SINGLE_LABEL,
    num_names: int = 1,
) -> TrainingArguments:
    # The mean error of several numbers is that of the largest ones; the loss is in units of their deviations.
    metric = "loss" if task == REGRESSION and num_names > 1 else TASKS[task].metric
    strategy = "steps" if has_validation else "no"
    return TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        max_steps=max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size if options.auto_batch else max(options.batch_size, 32),
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        lr_scheduler_type=options.scheduler,
        label_smoothing_factor=options.label_smoothing,
        gradient_accumulation_steps=options.gradient_accumulation,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        torch_compile=options.compile,
        use_cpu=options.cpu or not torch.cuda.is_available(),
        seed=options.seed,
        data_seed=options.seed,
        ddp_find_unused_parameters=False,
        fsdp=True if options.fsdp else None,
        fsdp_config={"transformer_layer_cls_to_wrap": [block_class], "state_dict_type": "SHARDED_STATE_DICT"},
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available() and not options.cpu,
        remove_unused_columns=False,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=strategy,
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.eval_steps,
        load_best_model_at_end=has_validation,
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
        metric_for_best_model=metric if has_validation else None,
        greater_is_better=TASKS[task].greater_is_better,
        report_to=options.report_to,
        push_to_hub=options.push_to_hub is not None,
        hub_model_id=options.push_to_hub,
    )
