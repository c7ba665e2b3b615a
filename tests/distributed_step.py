"""One of two processes on CPU: a training step under DDP or FSDP2, its gradients against those of one process.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python distributed_step.py ddp|fsdp2 reference|triton

Kernels are interpreted (TRITON_INTERPRET=1).
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig

import fastvit
from fastvit import ViTForImageClassification


def main(mode: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model = ViTForImageClassification(config)
    pixels, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    alone = copy.deepcopy(model)
    alone(pixels, labels=labels).loss.backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}

    if mode == "ddp":
        parallel = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in model.vit.encoder.layer:
            fully_shard(layer, mesh=mesh)
        parallel = fully_shard(model, mesh=mesh)
        assert isinstance(model.vit.encoder.layer[0].intermediate.dense.weight, DTensor)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    mine = slice(2 * rank, 2 * rank + 2)  # this process's half of the batch
    parallel(pixels[mine], labels=labels[mine]).loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    optimizer.step()
    assert parallel(pixels[mine], labels=labels[mine]).loss.isfinite()
    print("same gradients")
    dist.barrier()  # otherwise one process may close connections that the other still uses
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[2] == "triton":
        import interpreter

        interpreter.install()
    with fastvit.backend(sys.argv[2]):
        main(sys.argv[1])
