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
from fastvit.data.targets import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from fastvit.models.backbone import WRAPPER_TYPE, describe_model
from fastvit.report.tasks import TASKS
from fastvit.train.build import describe_count
from fastvit.train.options import FinetuneOptions
from fastvit.train.run_folder import select_run_options

CARD = """
# {name}

{kind} that {verb} {classes}. It was {origin} on {count} images of {dataset}.

## Metrics

```
{reports}```

## Use

```python
{registration}from transformers import pipeline

print(pipeline("image-classification", "{name}"{settings})("image.jpg"))
```

`from fastvit import {loader}` loads it as well.

## Training

`fastvit finetune --config config.yaml`, with fastvit {version}, transformers {transformers} and PyTorch {torch}:

```yaml
{options}```
"""


VERBS = {
    SINGLE_LABEL: "classifies images as",
    MULTI_LABEL: "labels images with any of",
    REGRESSION: "estimates, from images,",
}


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
    task = TASKS[images.task]
    results = [
        EvalResult("image-classification", images.name, images.name, task.metric, metrics[f"{prefix}_{task.metric}"],
                   dataset_split=split)
        for split, prefix in ((VALIDATION, "eval"), (TEST, "test"))
        if f"{prefix}_{task.metric}" in metrics
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
        verb=VERBS[images.task],
        settings=', function_to_apply="none"' if images.task == REGRESSION else "",
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
