"""The model card: a description of the model, its metrics, its use and its training, with the hub's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import fastvit
from fastvit.data.datasets import TEST, VALIDATION, ImageDataset
from fastvit.models.backbone import WRAPPER_TYPE, describe_model
from fastvit.train.build import describe_count
from fastvit.train.options import FinetuneOptions
from fastvit.train.run_folder import select_run_options

CARD = """
# {name}

{kind} that classifies images as {classes}. It was {origin} on {count} images of {dataset}.

## Metrics

```
{reports}```

## Use

```python
{registration}from transformers import pipeline

print(pipeline("image-classification", "{name}")("image.jpg"))
```

`from fastvit import {loader}` loads it as well.

## Training

`fastvit finetune --config config.yaml`, with fastvit {version}, transformers {transformers} and PyTorch {torch}:

```yaml
{options}```
"""


def build_model_card(
    options: FinetuneOptions, images: ImageDataset, metrics: dict[str, float], reports: str, config: Any
) -> ModelCard:
    """Build the model card of a run.

    Args:
        metrics: of the evaluated splits, as `write_results` returns them.
        reports: their tables of classes, as text.
        config: the model's config.
    """
    name = options.push_to_hub or Path(options.output_dir).name
    results = [
        EvalResult("image-classification", images.name, images.name, "accuracy", metrics[f"{prefix}_accuracy"],
                   dataset_split=split)
        for split, prefix in ((VALIDATION, "eval"), (TEST, "test"))
        if f"{prefix}_accuracy" in metrics
    ]  # fmt: skip
    pretrained = options.from_scratch is None and not Path(options.model).exists()
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "vision", "fastvit"],
        base_model=options.model if pretrained else None,
        datasets=[images.name] if options.dataset not in (None, "generated") else None,
        eval_results=results or None,
    )
    origin = f"fine-tuned from {options.model}" if options.from_scratch is None else "trained from scratch"
    classes = ", ".join(images.class_names[:20]) + (", ..." if len(images.class_names) > 20 else "")
    # transformers has no class for some classifiers of ours.
    registration = "import fastvit\nfastvit.register()\n\n" if config.model_type == WRAPPER_TYPE else ""
    text = CARD.format(
        name=name,
        kind=describe_model(config),
        registration=registration,
        loader="ViTForImageClassification" if config.model_type == "vit" else "Predictor",
        classes=classes,
        origin=origin,
        count=describe_count(images),
        dataset=images.name,
        reports=reports,
        version=fastvit.__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        options=yaml.safe_dump(select_run_options(options), sort_keys=False),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
