"""The tuning table: the tiles that each kernel may run with.

A rule lists at most three candidates for a kernel, a shape class, a dtype and a kind of GPU. A candidate maps names to
integers that the kernel's launcher interprets. An operation uses candidate number `candidate` of each of its kernels:
0 unless a measurement on this GPU selects another one (`fastvit.tuning`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

Choice = Mapping[str, int]


class Rule(NamedTuple):
    """One line of the table: patterns that it applies to, and tiles. None matches everything.

    shape, device: regular expressions for the launcher's shape class, and for "sm_90", "gfx942" or "interpreter".
    """

    operation: str
    shape: str | None
    dtype: torch.dtype | None
    device: str | None
    candidates: tuple[Choice, ...]


# Triton's own cdiv and next_power_of_2 take microseconds per call on the host.
def cdiv(total: int, size: int) -> int:
    """The number of pieces of `size` that cover `total`."""
    return -(-total // size)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def describe_rows(rows: int, dim: int) -> str:
    """The shape class for kernels that process rows."""
    return f"{next_power_of_2(dim)}, {'many' if rows >= 8192 else 'few'} rows"


def mm_tile(rows: int, columns: int, depth: int, num_warps: int, num_stages: int) -> Choice:
    """A matmul's output tile, rows x columns, and the part of the reduction dimension that one iteration covers."""
    return {"rows": rows, "columns": columns, "depth": depth, "num_warps": num_warps, "num_stages": num_stages}


CUBLAS: Choice = {"fused": 0}  # PyTorch's matmul; 1: our kernel, which fuses the operations before and after it
MATMULS = "linear_(forward|backward)"
WGMMA = "sm_(90|100)"  # has the wide tensor core instructions, and 227 KiB of shared memory per block

# The first matching line applies. Chosen from code compiled for sm_80 and sm_90, November 2026; not timed yet.
TABLE = (
    # elements: the most values of a row that one thread holds; num_warps: the fewest warps of a program. With 40 values
    # one warp holds a row of 768, 1024 or 1280 half-precision values in 48 to 72 registers, and its sums need no shared
    # memory. Four rows per program keep the number of programs low.
    Rule("layer_norm_forward", None, None, None, (
        {"elements": 40, "num_warps": 4}, {"elements": 40, "num_warps": 8}, {"elements": 16, "num_warps": 4},
    )),
    # waves: programs per multiprocessor, each of which sums weight gradients over its rows and writes them once. More
    # than fit at a time would run afterwards, alone. stages: 2 prefetches the next rows to shared memory.
    # 16 values take 96 to 138 registers when y is written again (three programs), 24 up to 240 (two, on Triton 3.6);
    # without prefetch 16 take at most 128 (four).
    Rule("layer_norm_backward", "256, .*", torch.float32, "sm_8.", (  # prefetch spills 8 bytes here, on Triton 3.6
        {"elements": 16, "num_warps": 4, "waves": 4, "stages": 1},
    )),
    Rule("layer_norm_backward", None, None, None, (
        {"elements": 16, "num_warps": 4, "waves": 3, "stages": 2},
        {"elements": 24, "num_warps": 4, "waves": 2, "stages": 2},
        {"elements": 16, "num_warps": 4, "waves": 4, "stages": 1},
    )),
    # Interpreter on a CPU: small tiles, so that small images fill several of them.
    Rule("patch_embed_.*", None, None, "interpreter", (mm_tile(32, 32, 32, 4, 1), mm_tile(16, 64, 16, 4, 1))),
    # Full float32 matmuls do not use tensor cores: they need 8 x 8 sums per thread and a shallow depth, or they spill.
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
    # rows x columns of a program: 256 half-precision columns are 16-byte loads of one warp, and divide every width of a
    # feed-forward (768 to 5,120). 16 rows give each thread four loads in flight, 8 rows twice the programs.
    Rule("activation_forward", None, None, None, (
        {"rows": 16, "columns": 256, "num_warps": 4}, {"rows": 8, "columns": 256, "num_warps": 4},
    )),
    # Bias gradient sums stay in registers, 16 per thread. waves, stages: as in layer_norm_backward; five programs fit.
    Rule("activation_backward", None, None, None, (
        {"rows": 8, "columns": 256, "num_warps": 4, "waves": 4, "stages": 2},
        {"rows": 8, "columns": 256, "num_warps": 4, "waves": 4, "stages": 1},
    )),
    # Prefetch spills 8 bytes on sm_90 (Triton 3.9). Three programs fit.
    Rule("swiglu_backward", None, None, None, ({"rows": 8, "columns": 256, "num_warps": 4, "waves": 3, "stages": 1},)),
    # Whole rows in registers, as in layer_norm_forward. A feed-forward's rows take four warps each.
    Rule("(layer_norm|activation)_fp8", None, None, None, (
        {"elements": 40, "num_warps": 4}, {"elements": 24, "num_warps": 4}, {"elements": 40, "num_warps": 8},
    )),
    # Matmuls with an activation: cuBLAS and an activation pass, our fused kernel, the persistent one. cuBLAS is first
    # until ours has been measured against it. Full float32 matmuls do not use tensor cores: nothing to gain there.
    Rule(MATMULS, None, torch.float32, None, (CUBLAS,)),
    Rule(MATMULS, None, None, "interpreter", (CUBLAS,)),
    # 128 x 128 in eight warps: forward 124 registers, backward 125 to 128, and 96 KiB, so that two programs share a
    # multiprocessor and one multiplies while the other computes its activation. 128 x 256 reads the rows half as often
    # but takes 226 to 244 registers and 192 KiB: the tensor cores of its one program wait during the activation.
    # Compiled for sm_90 with Triton 3.6 and 3.9, 29 November 2026; not measured. persistent: programs per
    # multiprocessor, each of which processes tile after tile, by descriptor (TMA).
    Rule(MATMULS, None, None, WGMMA, (
        CUBLAS,
        {"fused": 1, **mm_tile(128, 128, 64, 8, 3)},
        {"fused": 1, "persistent": 2, **mm_tile(128, 128, 64, 8, 3)},
    )),
    # Four warps for the same reason: 221 to 248 registers and 48 KiB (of 99 on sm_86 and sm_89) allow two programs per
    # multiprocessor; eight warps take 129 to 158 registers and allow one.
    Rule(MATMULS, None, None, None, (CUBLAS, {"fused": 1, **mm_tile(128, 128, 32, 4, 4)})),
    # Attention. rows, keys: the tile of scores. piece: all keys at once, in pieces of at most this size, and `blocks`
    # tiles of rows per program, so that nothing is read twice. Registers below are for Triton 3.6 / 3.9.
    # Full float32 matmuls do not use tensor cores: larger tiles spill thousands of registers.
    Rule("attention_forward", None, torch.float32, None, ({"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 2},)),
    # wgmma needs 64 rows. 208 keys as 128 + 64 + 16 take 189 / 193 registers, head dim 80 255 / 249, 256 keys in one
    # piece 201 / 253: two programs per multiprocessor. In pieces of 64, the latter two spill 112 and 32 bytes on 3.6.
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
    # keys_per_warp: one kernel, one program per head, 256 keys in 16 or 8 warps. It moves 620 MB at ViT-B/16's shape
    # with 5 matmuls; two kernels move 930 MB with 7. With mma.sync it spills. The sums of both gradients take half of a
    # multiprocessor's registers, so 64 rows, whose scores would take the other half, spill 400 to 1,000 bytes.
    # transposed: wgmma for the queries' gradients too (28 to 40 of them, no mma.sync, and 84 KiB of shared memory
    # instead of 116); it spills 16 / 24 bytes with 8 warps, 56 / 48 with 16.
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
    """The properties that a choice depends on, cached. A CPU, where Triton interprets, counts as a small GPU."""
    if device.type != "cuda":
        return Device("interpreter", "interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return Device(properties.name, architecture, properties.multi_processor_count)


def find_candidates(operation: str, shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Choice, ...]:
    """The table's candidates for a kernel and a shape class such as "1024, many rows"."""
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
    """Candidate `number`, from 0, or the first if the rule has fewer."""
    options = find_candidates(operation, shape, dtype, device)
    return options[number] if number < len(options) else options[0]
