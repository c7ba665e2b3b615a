"""Reads checkpoints in three formats and converts between them.

    hf    a Hugging Face folder: config.json (model_type "vit"), weights, preprocessor_config.json; DINOv2,
          DeiT, ViTMAE and ViTMSN are read as well where they compute a plain ViT (`folding`)
    timm  a VisionTransformer of the timm library: a file of tensors, or a folder as on the hub
    npz   the JAX files of the paper's authors (github.com/google-research/vision_transformer)

A checkpoint in memory has the names of the hub (`names`). A tensor that is missing, unexpected or of the wrong shape
stops the conversion (`checkpoint`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fastvit.checkpoints.checkpoint import Checkpoint
from fastvit.checkpoints.configuration import read_json
from fastvit.checkpoints.folding import FOLDABLE, check_foldable, read_foldable
from fastvit.checkpoints.hugging_face import read_hf, write_hf
from fastvit.checkpoints.inspection import check_is_finished
from fastvit.checkpoints.names import Format
from fastvit.checkpoints.npz import read_npz, write_npz
from fastvit.checkpoints.tensors import (
    TORCH_SUFFIXES,
    has_torch_suffix,
    read_recorded_heads,
    read_tensors,
    read_weights,
)
from fastvit.checkpoints.timm import read_timm, write_timm
from fastvit.errors import InputError


def read_checkpoint(source: str | Path, *, num_heads: int | None = None) -> Checkpoint:
    """Reads a checkpoint and detects its format. No code in it is run.

    Args:
        source: A Hugging Face or timm folder, a timm .safetensors, .pth, .pth.tar, .pt, .ckpt or .bin file, or an .npz
            file. Of a training script's checkpoint the moving averages of the weights are read if it has them, as in
            timm.
        num_heads: The number of attention heads, which a timm file does not record unless `convert` wrote it. Required
            if timm has no model of this hidden size. It must match a recorded number.

    Returns:
        The checkpoint, with the tensors under the names of the hub.

    Raises:
        InputError: If the checkpoint cannot be read, or its model is not supported.
    """
    source = Path(source)
    if source.is_dir():
        if not (source / "config.json").is_file():
            check_is_finished(source)
        config = read_json(source / "config.json")
        if "architecture" in config:
            checkpoint = read_timm(source, read_weights(source), config, num_heads)
        elif config.get("model_type") in FOLDABLE:
            checkpoint = read_foldable(source, config)
        else:
            check_foldable(source, config)
            checkpoint = read_hf(source, config)
    elif not source.is_file():
        raise InputError(f"{source}: no such file or folder")
    elif source.suffix == ".npz":
        checkpoint = read_npz(source)
    elif source.suffix == ".safetensors":
        tensors = read_tensors(source)
        checkpoint = read_timm(source, tensors, {"num_heads": read_recorded_heads(source)}, num_heads)
    elif has_torch_suffix(source):
        checkpoint = read_timm(source, read_tensors(source, of_training=True), {}, num_heads)
    else:
        expected = ", ".join((".safetensors", *TORCH_SUFFIXES, ".npz"))
        raise InputError(f"{source}: expected a folder or a file ending in {expected}, got {source.suffix!r}")
    if num_heads not in (None, checkpoint.config.num_attention_heads):
        raise InputError(f"num_heads: {source} has {checkpoint.config.num_attention_heads} heads, got {num_heads}")
    return checkpoint


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    to: Format | None = None,
    num_heads: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Converts the checkpoint `source` to another format at `dest`.

    The tensors are copied bit for bit, except that npz, which has no bfloat16, stores float32 instead. timm and npz
    files do not record labels, image settings, layer_norm_eps and hidden_act; a warning is issued if the last two
    differ from those of the format. If the conversion fails, nothing is left at `dest` or beside it.

    Args:
        source: The checkpoint, as in `read_checkpoint`.
        dest: The file or folder to write.
        to: "hf" writes a folder for transformers (config.json, model.safetensors, preprocessor_config.json), "timm" a
            .safetensors file, "npz" an .npz file. By default the suffix of `dest` decides; without one of these
            suffixes it is a folder.
        num_heads: As in `read_checkpoint`.
        overwrite: Whether to replace an existing `dest`. A folder is replaced only if it holds a checkpoint and no
            folders.

    Returns:
        `dest`.

    Raises:
        InputError: If the checkpoint cannot be read or is not supported, or `dest` exists or does not match the format.
    """
    dest = Path(dest)
    if to is None:
        to = "timm" if dest.suffix == ".safetensors" else "npz" if dest.suffix == ".npz" else "hf"
    check_dest(dest, to, overwrite)
    checkpoint = read_checkpoint(source, num_heads=num_heads)
    write = {"hf": write_hf, "timm": write_timm, "npz": write_npz}[to]
    # The scratch folder is beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.absolute().parent) as scratch:
        fresh = Path(scratch) / ("new" + dest.suffix)
        write(checkpoint, fresh)
        replace_destination(fresh, dest, Path(scratch) / "old")
    return dest


def check_dest(dest: Path, to: Format, overwrite: bool) -> None:
    suffix = {"hf": "", "timm": ".safetensors", "npz": ".npz"}.get(to)
    if suffix is None:
        raise InputError(f"to: expected hf, timm or npz, got {to!r}")
    if suffix and dest.suffix != suffix:
        raise InputError(f"dest: expected a file ending in {suffix} for {to}, got {dest}")
    if not suffix and dest.name.endswith((".safetensors", ".npz", *TORCH_SUFFIXES)):
        raise InputError(f"dest: expected the name of a folder for hf, or a .safetensors or .npz file, got {dest}")
    if not dest.absolute().parent.is_dir():
        raise InputError(f"dest: no such folder: {dest.parent}")
    if not dest.exists():
        return
    if not overwrite:
        raise InputError(f"dest: {dest} exists already: choose another name, or overwrite it (--overwrite)")
    if dest.is_dir() == bool(suffix):
        found, new = ("folder", "file") if suffix else ("file", "folder")
        raise InputError(f"dest: {dest} is a {found}: not overwritten by a {new}")
    # A mistyped name must not delete a home directory or a repository.
    if dest.is_dir() and (not (dest / "config.json").is_file() or any(entry.is_dir() for entry in dest.iterdir())):
        raise InputError(f"dest: {dest} is not overwritten: expected a folder with a checkpoint and no folders")


def replace_destination(fresh: Path, dest: Path, old: Path) -> None:
    """Renames `fresh` to `dest`. An existing folder is moved to `old` first, and restored if the rename fails."""
    if not dest.is_dir():
        fresh.replace(dest)
        return
    dest.rename(old)
    try:
        fresh.rename(dest)
    except OSError:
        old.rename(dest)
        raise
