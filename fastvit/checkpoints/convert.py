"""Read a checkpoint of any of three formats, and convert it to another.

    hf    a Hugging Face folder: config.json (model_type "vit"), weights, preprocessor_config.json
    timm  a VisionTransformer of the timm library: a file of tensors, or a folder as on the hub
    npz   the JAX files of the paper's authors (github.com/google-research/vision_transformer)

Everything is read into hub names and written from them (`names`), and every tensor is accounted for (`checkpoint`): one
that is missing, left over or of the wrong shape stops the conversion.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fastvit.checkpoints.checkpoint import Checkpoint
from fastvit.checkpoints.configuration import read_json
from fastvit.checkpoints.hugging_face import read_hf, write_hf
from fastvit.checkpoints.names import Format
from fastvit.checkpoints.npz import read_npz, write_npz
from fastvit.checkpoints.tensors import TORCH_SUFFIXES, read_tensors, read_weights
from fastvit.checkpoints.timm import read_timm, write_timm
from fastvit.errors import InputError


def read_checkpoint(source: str | Path, *, num_heads: int | None = None) -> Checkpoint:
    """Read a checkpoint; the format is recognised.

    source: a Hugging Face or timm folder, a timm .safetensors, .pth, .pt or .bin file (torch files are read without
    running any code in them), or an .npz file. num_heads: attention heads, which a timm file does not record: needed
    when they are not 64 wide and the architecture is not known; elsewhere it must agree with the checkpoint.
    Raises InputError when the checkpoint cannot be read or holds what this model cannot express.
    """
    source = Path(source)
    if source.is_dir():
        config = read_json(source / "config.json")
        if "architecture" in config:
            checkpoint = read_timm(source, read_weights(source), config, num_heads)
        else:
            checkpoint = read_hf(source, config)
    elif not source.is_file():
        raise InputError(f"{source}: no such file or folder")
    elif source.suffix == ".npz":
        checkpoint = read_npz(source)
    elif source.suffix == ".safetensors" or source.suffix in TORCH_SUFFIXES:
        checkpoint = read_timm(source, read_tensors(source), {}, num_heads)
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
    """Convert the checkpoint `source` to another format at `dest`, and return `dest`.

    to: "hf" writes a folder that transformers loads (config.json, model.safetensors, preprocessor_config.json), "timm"
    a .safetensors file, "npz" an .npz file; by default told from dest's suffix, a folder when it is neither.
    source and num_heads: as in `read_checkpoint`. overwrite: replace `dest` where it exists; a folder is replaced only
    when it is a checkpoint without folders in it.

    The tensors are carried over bit for bit (bfloat16 becomes float32 in npz, which has no such type). timm and npz
    files have no place for labels and picture settings, nor for layer_norm_eps and hidden_act, where a warning says
    that the model will be computed with others. When the conversion fails, nothing is left at `dest` or beside it.
    Raises InputError as `read_checkpoint` does, and when dest exists or does not suit the format.
    """
    dest = Path(dest)
    if to is None:
        to = "timm" if dest.suffix == ".safetensors" else "npz" if dest.suffix == ".npz" else "hf"
    check_dest(dest, to, overwrite)
    checkpoint = read_checkpoint(source, num_heads=num_heads)
    write = {"hf": write_hf, "timm": write_timm, "npz": write_npz}[to]
    # The scratch folder stands beside the target, so that the last step is a rename within one file system.
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
    if not suffix and dest.suffix in (".safetensors", ".npz", *TORCH_SUFFIXES):
        raise InputError(f"dest: expected the name of a folder for hf, or a .safetensors or .npz file, got {dest}")
    if not dest.absolute().parent.is_dir():
        raise InputError(f"dest: no such folder: {dest.parent}")
    if not dest.exists():
        return
    if not overwrite:
        raise InputError(f"dest: {dest} exists already: choose another name, or overwrite it (--overwrite)")
    if dest.is_dir() == bool(suffix):
        raise InputError(f"dest: {dest} is a {'folder' if suffix else 'file'}: not overwritten by the other kind")
    # A mistyped name must not cost a home directory or a repository.
    if dest.is_dir() and (not (dest / "config.json").is_file() or any(entry.is_dir() for entry in dest.iterdir())):
        raise InputError(f"dest: {dest} is not a folder that holds a checkpoint alone: not overwritten")


def replace_destination(fresh: Path, dest: Path, old: Path) -> None:
    """Rename `fresh` to `dest`; a folder in the way goes to `old`, and comes back should the rename fail."""
    if not dest.is_dir():
        fresh.replace(dest)
        return
    dest.rename(old)
    try:
        fresh.rename(dest)
    except OSError:
        old.rename(dest)
        raise
