"""The tiles that each kernel may run with: one table.

A rule lists at most three candidates for a kernel, a shape class, a dtype and a kind of GPU; a candidate maps names to
integers that the kernel's launcher understands. An operation runs with candidate number `candidate` of each of its
kernels, 0 unless a measurement on this GPU says otherwise (`fastvit.tuning`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

Choice = Mapping[str, int]


class Rule(NamedTuple):
    """One line of the table: patterns for what it holds for, and tiles. None matches everything.

    shape, device: regular expressions for the launcher's word for the shape, and for "sm_90", "gfx942", "interpreter".
    """

    operation: str
    shape: str | None
    dtype: torch.dtype | None
    device: str | None
    candidates: tuple[Choice, ...]


# Triton's own cdiv and next_power_of_2 cost microseconds a call on the host.
def cdiv(total: int, size: int) -> int:
    """How many pieces of `size` cover `total`."""
    return -(-total // size)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def describe_rows(rows: int, dim: int) -> str:
    """The word for the shape of kernels that work row by row."""
    return f"{next_power_of_2(dim)}, {'many' if rows >= 8192 else 'few'} rows"


def mm_tile(rows: int, columns: int, depth: int, num_warps: int, num_stages: int) -> Choice:
    """A matrix product's tile of the output, rows x columns, and how much of the summed dimension a step takes."""
    return {"rows": rows, "columns": columns, "depth": depth, "num_warps": num_warps, "num_stages": num_stages}


CUBLAS: Choice = {"fused": 0}  # torch's product; `fused` is 1 where ours does what stands before and after it, too
MATMULS = "linear_(forward|backward)"
WGMMA = "sm_(90|100)"  # has the wide tensor core instructions, and 227 KiB of shared memory a block

# The first line that matches is used. Chosen from what was compiled for sm_80 and sm_90, November 2026; not yet timed.
TABLE = (
    # elements: the most values of a row that one thread holds; num_warps: the fewest warps a program has.
    # 40 values keep a row of 768, 1024 or 1280 half-precision values in one warp, so that its sums need no shared
    # memory, in 48 to 72 registers; four such rows a program keep the number of programs to launch low.
    Rule("layer_norm_forward", None, None, None, (
        {"elements": 40, "num_warps": 4}, {"elements": 40, "num_warps": 8}, {"elements": 16, "num_warps": 4},
    )),
    # waves: programs a multiprocessor; each sums weight gradients over its rows, and writes them once. No more than fit
    # on it at a time: the others would run afterwards, alone. stages: 2 copies the next rows to shared memory ahead.
    # 16 values take 96 to 138 registers with y written again (three programs), 24 up to 240 (two, on Triton 3.6);
    # without copies ahead 16 take 128 at most (four).
    Rule("layer_norm_backward", "256, .*", torch.float32, "sm_8.", (  # copies ahead spill 8 bytes here, on Triton 3.6
        {"elements": 16, "num_warps": 4, "waves": 4, "stages": 1},
    )),
    Rule("layer_norm_backward", None, None, None, (
        {"elements": 16, "num_warps": 4, "waves": 3, "stages": 2},
        {"elements": 24, "num_warps": 4, "waves": 2, "stages": 2},
        {"elements": 16, "num_warps": 4, "waves": 4, "stages": 1},
    )),
    # Interpreted on a CPU: small, so that small images fill several tiles.
    Rule("patch_embed_.*", None, None, "interpreter", (mm_tile(32, 32, 32, 4, 1), mm_tile(16, 64, 16, 4, 1))),
    # Full float32 products run on the ordinary units: 8 x 8 sums a thread, and a shallow depth, or they spill.
    Rule("patch_embed_weight", None, torch.float32, None, (mm_tile(64, 64, 32, 8, 2),)),
    Rule("patch_embed_.*", "many.*", torch.float32, None, (mm_tile(128, 128, 16, 8, 3), mm_tile(64, 64, 16, 8, 2))),
    Rule("patch_embed_.*", None, torch.float32, None, (mm_tile(64, 64, 16, 8, 2),)),
    # wgmma needs 64 rows; 256 columns so that hidden <= 256 reads the pixels once and 768 three times.
    Rule("patch_embed_forward", "many.*", None, WGMMA, (mm_tile(128, 256, 32, 8, 4), mm_tile(64, 128, 64, 4, 3))),
    Rule("patch_embed_weight", "many.*", None, WGMMA, (mm_tile(256, 128, 64, 8, 3), mm_tile(64, 128, 64, 4, 3))),
    Rule("patch_embed_.*", "few.*", None, WGMMA, (mm_tile(64, 128, 64, 4, 3), mm_tile(64, 64, 64, 4, 3))),
    # Any other GPU: 99 KiB of shared memory on sm_86 and sm_89, 64 KiB on gfx942.
    Rule("patch_embed_.*", "many.*", None, None, (mm_tile(128, 128, 32, 8, 2), mm_tile(64, 64, 32, 4, 3))),
    Rule("patch_embed_.*", None, None, None, (mm_tile(64, 64, 32, 4, 3),)),
    # rows x columns of a program: 256 half-precision columns are one warp's 16-byte loads, and divide every width of a
    # feed-forward (768 to 5,120); 16 rows give each thread four loads in flight, 8 rows twice the programs.
    Rule("activation_forward", None, None, None, (
        {"rows": 16, "columns": 256, "num_warps": 4}, {"rows": 8, "columns": 256, "num_warps": 4},
    )),
    # Sums of the bias gradient stay in registers: 16 a thread. waves, stages: as in layer_norm_backward; five fit.
    Rule("activation_backward", None, None, None, (
        {"rows": 8, "columns": 256, "num_warps": 4, "waves": 4, "stages": 2},
        {"rows": 8, "columns": 256, "num_warps": 4, "waves": 4, "stages": 1},
    )),
    # With copies ahead it spills 8 bytes on sm_90 (Triton 3.9). Three programs fit.
    Rule("swiglu_backward", None, None, None, ({"rows": 8, "columns": 256, "num_warps": 4, "waves": 3, "stages": 1},)),
    # As in layer_norm_forward: whole rows in registers. A feed-forward's rows take four warps each.
    Rule("(layer_norm|activation)_fp8", None, None, None, (
        {"elements": 40, "num_warps": 4}, {"elements": 24, "num_warps": 4}, {"elements": 40, "num_warps": 8},
    )),
    # Products with an activation: cuBLAS and a pass for the activation, our fused kernel, the persistent one. cuBLAS
    # comes first until ours is measured against it: it is known to be fast. Full float32 products run on the ordinary
    # units, where there is nothing to gain on it.
    Rule(MATMULS, None, torch.float32, None, (CUBLAS,)),
    Rule(MATMULS, None, None, "interpreter", (CUBLAS,)),
    # 128 x 128 in eight warps: forward 124 registers, backward 125 to 128, 96 KiB, so that two programs share a
    # multiprocessor: one multiplies while the other computes its activation. 128 x 256 reads the rows half as often,
    # but takes 226 to 244 registers and 192 KiB: one program, whose tensor cores wait during the activation. Compiled
    # for sm_90 with Triton 3.6 and 3.9, 29 November 2026; not measured. persistent: programs a multiprocessor that take
    # tile after tile, by descriptor (TMA).
    Rule(MATMULS, None, None, WGMMA, (
        CUBLAS,
        {"fused": 1, **mm_tile(128, 128, 64, 8, 3)},
        {"fused": 1, "persistent": 2, **mm_tile(128, 128, 64, 8, 3)},
    )),
    # Four warps for the same reason: 221 to 248 registers and 48 KiB each (of 99 on sm_86 and sm_89), two programs a
    # multiprocessor; eight warps take 129 to 158 and leave room for one.
    Rule(MATMULS, None, None, None, (CUBLAS, {"fused": 1, **mm_tile(128, 128, 32, 4, 4)})),
    # Attention. rows, keys: the tile of scores. piece: all keys at once, in pieces of at most so many, and `blocks`
    # tiles of rows for a program: nothing is read twice. Registers below are of Triton 3.6 / 3.9.
    # Full float32 products run on the ordinary units: larger tiles spill thousands of registers.
    Rule("attention_forward", None, torch.float32, None, ({"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 2},)),
    # wgmma needs 64 rows. 208 keys as 128 + 64 + 16 take 189 / 193 registers, 80-wide heads 255 / 249, 256 keys in one
    # piece 201 / 253: two programs a multiprocessor. In pieces of 64, the latter two spilled 112 and 32 bytes on 3.6.
    Rule("attention_forward", "short, dim (64|80)", None, "sm_90", (
        {"rows": 64, "piece": 256, "blocks": 4, "num_warps": 4, "num_stages": 2},
        {"rows": 64, "piece": 256, "blocks": 4, "num_warps": 4, "num_stages": 1},
        {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    )),
    # With mma.sync 64 rows spill, 32 do not.
    Rule("attention_forward", "short, dim 64", None, "sm_80", (
        {"rows": 32, "piece": 64, "blocks": 8, "num_warps": 4, "num_stages": 1},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    )),
    Rule("attention_forward", ".*, dim 128", None, None, (
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    )),
    Rule("attention_forward", None, None, None, (
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2},
    )),
    # keys_per_warp: one kernel, one program a head, 256 keys in 16 warps or 8. It reads and writes 620 MB at ViT-B/16's
    # shape; two kernels 930 MB, with 7 products instead of 5. With mma.sync it spills. The sums of both gradients are
    # half of a multiprocessor's registers, so 64 rows, whose scores would be the other half, spill 400 to 1,000 bytes.
    # transposed: the product for queries' gradients by wgmma too (28 to 40 of them, no mma.sync, and 84 KiB of shared
    # memory instead of 116); with 8 warps it spills 16 / 24 bytes, with 16 warps 56 / 48.
    # Otherwise two kernels, by queries and (key_value_) by keys.
    Rule("attention_backward", None, torch.float32, None, (
        {"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 2,
         "key_value_rows": 32, "key_value_keys": 32, "key_value_warps": 8},
    )),
    Rule("attention_backward", "short, dim 64", None, "sm_90", (
        {"rows": 32, "keys_per_warp": 16, "transposed": 0, "num_stages": 1},
        {"rows": 32, "keys_per_warp": 32, "transposed": 1, "num_stages": 1},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2,
         "key_value_rows": 32, "key_value_keys": 64, "key_value_warps": 4},
    )),
    Rule("attention_backward", ".*, dim 128", None, None, (
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2,
         "key_value_rows": 64, "key_value_keys": 64, "key_value_warps": 8},
    )),
    Rule("attention_backward", None, None, None, (
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2,
         "key_value_rows": 32, "key_value_keys": 64, "key_value_warps": 4},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2,
         "key_value_rows": 32, "key_value_keys": 128, "key_value_warps": 8},
    )),
)  # fmt: skip


class Device(NamedTuple):
    name: str
    architecture: str
    multiprocessors: int


@functools.cache
def describe_device(device: torch.device) -> Device:
    """What the choice depends on; asked of the driver once. A CPU, where Triton interprets, counts as a small GPU."""
    if device.type != "cuda":
        return Device("interpreter", "interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return Device(properties.name, architecture, properties.multi_processor_count)


def find_candidates(operation: str, shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Choice, ...]:
    """The table's line for a kernel and the launcher's word for the shape, such as "1024, many rows"."""
    architecture = describe_device(device).architecture
    for rule in TABLE:
        if (
            re.fullmatch(rule.operation, operation)
            and (rule.shape is None or re.fullmatch(rule.shape, shape))
            and rule.dtype in (None, dtype)
            and (rule.device is None or re.fullmatch(rule.device, architecture))
        ):
            return rule.candidates
    raise KeyError(f"no tile for {operation}, {shape}, {dtype}, {architecture}")


def select(operation: str, shape: str, dtype: torch.dtype, device: torch.device, number: int) -> Choice:
    """Candidate `number`, from 0, for one launch; the first where the rule has fewer."""
    options = find_candidates(operation, shape, dtype, device)
    return options[number] if number < len(options) else options[0]
