"""Train on several GPUs with Accelerate: each process has a copy of the model, gradients are averaged (DDP).

    torchrun --nproc-per-node 8 examples/ddp.py      # 8 GPUs of this machine, or 8 CPU processes without a GPU
    python examples/ddp.py --data-dir my-images      # one process; my-images/CLASS/*.jpg

The batch size is per process. Printed numbers, such as the accuracy, are over all processes.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, get_linear_schedule_with_warmup

from fastvit import ViTForImageClassification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="hub id or folder (%(default)s)")
    parser.add_argument("--dataset", default="AI-Lab-Makerere/beans", help="images on the hub (%(default)s)")
    parser.add_argument("--data-dir", help="a folder of images, used instead of --dataset")
    parser.add_argument("--output-dir", default="runs/ddp", help="%(default)s")
    parser.add_argument("--epochs", type=int, default=4, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="per process (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="%(default)s")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"], help="%(default)s")
    options = parser.parse_args()

    # On a machine without a GPU, Accelerate connects the processes only with cpu=True.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=options.mixed_precision)
    set_seed(0)
    with accelerator.main_process_first():  # the main process fills the cache, then the others read it
        if options.data_dir:
            dataset = load_dataset("imagefolder", data_dir=options.data_dir, split="train")
        else:
            dataset = load_dataset(options.dataset, split="train")
    label = "labels" if "labels" in dataset.features else "label"
    names = dataset.features[label].names
    halves = dataset.train_test_split(0.15, stratify_by_column=label, seed=0)
    processor = AutoImageProcessor.from_pretrained(options.model)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert("RGB") for row in rows]
        pixels = processor(images, return_tensors="pt").pixel_values
        return {"pixel_values": pixels, "labels": torch.tensor([row[label] for row in rows])}

    train = DataLoader(halves["train"], options.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    validation = DataLoader(halves["test"], options.batch_size, collate_fn=collate)
    model = ViTForImageClassification.from_pretrained(
        options.model, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model, optimizer, train, validation = accelerator.prepare(model, optimizer, train, validation)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, options.epochs * len(train))

    for epoch in range(options.epochs):
        model.train()
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        right = []
        for batch in validation:
            with torch.no_grad():
                guess = model(**batch).logits.argmax(-1)
            right.append(accelerator.gather_for_metrics(guess == batch["labels"]))
        right = torch.cat(right)  # each validation image once, for any number of processes
        accelerator.print(f"epoch {epoch + 1}: validation accuracy {right.float().mean():.1%} of {len(right)} images")

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output_dir)
        processor.save_pretrained(options.output_dir)
    accelerator.print(f"saved: {options.output_dir} (trained by {accelerator.num_processes} processes)")
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # also lets Gloo's threads release the gathered tensors, without which they may hang
    accelerator.end_training()


if __name__ == "__main__":
    main()
