"""Fine-tune a ViT with transformers' Trainer: an ordinary script with one import changed.

    python examples/swap_import.py                         # google/vit-base-patch16-224-in21k on beans, from the hub
    python examples/swap_import.py --data-dir my-images    # my-images/CLASS/*.jpg

A folder may have subfolders train/ and validation/; otherwise 15 % of the images are held out for validation.
"""

import argparse

from datasets import load_dataset
from transformers import AutoImageProcessor, Trainer, TrainingArguments, set_seed

from fastvit import ViTForImageClassification  # was: from transformers import ViTForImageClassification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="hub id or folder (%(default)s)")
    parser.add_argument("--dataset", default="AI-Lab-Makerere/beans", help="images on the hub (%(default)s)")
    parser.add_argument("--data-dir", help="a folder of images, used instead of --dataset")
    parser.add_argument("--output-dir", default="runs/swap_import", help="%(default)s")
    parser.add_argument("--epochs", type=float, default=4, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="%(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="%(default)s")
    options = parser.parse_args()
    set_seed(0)  # the classifier is initialised before Trainer sets its own seed

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
        options.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # the classifier differs from the checkpoint's
    )

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
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            remove_unused_columns=False,  # `prepare` reads the images
            report_to="none",
        ),
        train_dataset=dataset["train"].with_transform(prepare),
        eval_dataset=dataset["validation"].with_transform(prepare),
        processing_class=processor,
        compute_metrics=lambda guess: {"accuracy": (guess.predictions.argmax(-1) == guess.label_ids).mean()},
    )
    trainer.train()
    print(f"validation accuracy: {trainer.evaluate()['eval_accuracy']:.1%}")
    trainer.save_model()  # transformers and its pipeline also load this folder
    print(f"saved: {options.output_dir}")


if __name__ == "__main__":
    main()
