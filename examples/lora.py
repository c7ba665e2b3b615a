"""Train LoRA adapters on query and value, and the classifier; all other weights are frozen.

    python examples/lora.py                         # google/vit-base-patch16-224-in21k on beans, from the hub
    python examples/lora.py --data-dir my-images    # my-images/CLASS/*.jpg, with or without train/ and validation/

Saves the adapters, and in the subfolder merged/ a complete model with the adapters merged into its weights.
Requires the package peft.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoImageProcessor, Trainer, TrainingArguments, set_seed

from fastvit import ViTForImageClassification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="hub id or folder (%(default)s)")
    parser.add_argument("--dataset", default="AI-Lab-Makerere/beans", help="images on the hub (%(default)s)")
    parser.add_argument("--data-dir", help="a folder of images, used instead of --dataset")
    parser.add_argument("--output-dir", default="runs/lora", help="%(default)s")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (%(default)s)")
    parser.add_argument("--epochs", type=float, default=4, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="%(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="%(default)s")
    options = parser.parse_args()
    set_seed(0)  # classifier and adapters are initialised before Trainer sets its own seed

    if options.data_dir:
        dataset = load_dataset("imagefolder", data_dir=options.data_dir)
    else:
        dataset = load_dataset(options.dataset)
    label = "labels" if "labels" in dataset["train"].features else "label"
    if "validation" not in dataset:
        held_out = dataset["train"].train_test_split(0.15, stratify_by_column=label, seed=0)
        dataset["train"], dataset["validation"] = held_out["train"], held_out["test"]
    names = dataset["train"].features[label].names

    processor = AutoImageProcessor.from_pretrained(options.model)
    model = ViTForImageClassification.from_pretrained(
        options.model, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    adapters = LoraConfig(
        target_modules=["query", "value"],  # the hub's names; transformers 5 has q_proj and v_proj in memory
        modules_to_save=["classifier"],
        r=options.rank,
        lora_alpha=options.rank,
        lora_dropout=0.1,
    )
    model = get_peft_model(model, adapters)
    model.print_trainable_parameters()

    def prepare(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        return {"pixel_values": processor(images, return_tensors="pt").pixel_values, "labels": batch[label]}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            eval_strategy="epoch",
            save_strategy="no",
            label_names=["labels"],  # PEFT's wrapper hides the model's arguments from Trainer
            remove_unused_columns=False,  # `prepare` reads the images
            report_to="none",
        ),
        train_dataset=dataset["train"].with_transform(prepare),
        eval_dataset=dataset["validation"].with_transform(prepare),
        compute_metrics=lambda guess: {"accuracy": (guess.predictions.argmax(-1) == guess.label_ids).mean()},
    )
    trainer.train()
    print(f"validation accuracy: {trainer.evaluate()['eval_accuracy']:.1%}")
    model.save_pretrained(options.output_dir)  # only the adapters
    merged = model.merge_and_unload()
    merged.save_pretrained(f"{options.output_dir}/merged")
    processor.save_pretrained(f"{options.output_dir}/merged")
    print(f"saved: {options.output_dir} (adapters) and {options.output_dir}/merged (a complete model)")


if __name__ == "__main__":
    main()
