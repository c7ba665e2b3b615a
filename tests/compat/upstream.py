"""transformers' shared test classes, from the folder that FASTVIT_TRANSFORMERS_TESTS names, as package `PACKAGE`.

The source distribution has the files of the tests folder but not its subfolders. This module defines what the shared
classes of transformers 5.24 import from those: two mixins that ViT does not need (generation, and export, which
vit_tester.py tests), the options of a config, and the tests of a pipeline.
"""

import atexit
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

PACKAGE = "transformers_tests"

if not os.environ.get("FASTVIT_TRANSFORMERS_TESTS"):
    pytest.skip(
        "transformers' test files are missing: `make compat` downloads them from a package registry",
        allow_module_level=True,
    )

FOLDER = Path(os.environ["FASTVIT_TRANSFORMERS_TESTS"])


def define_module(name: str, **contents) -> None:
    """Define a module of the package unless its folder contains it."""
    if (FOLDER / "tests" / Path(*name.split("."))).with_suffix(".py").exists():
        return
    parent = f"{PACKAGE}.{name.rpartition('.')[0]}"
    for full_name in (parent, f"{PACKAGE}.{name}"):
        sys.modules.setdefault(full_name, ModuleType(full_name))
    vars(sys.modules[f"{PACKAGE}.{name}"]).update(contents)


class ExportTesterMixin:
    """Empty: vit_tester.py tests the export of both fastvit's and transformers' classes."""


class GenerationTesterMixin:
    """Empty: ViT does not generate text."""


# Options that every config accepts, each with a value that differs from its default.
CONFIG_OPTIONS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["ViTModel"],
    "finetuning_task": "leaves",
    "id2label": {0: "healthy"},
    "label2id": {"healthy": 0},
    "problem_type": "regression",
}


class PipelineTests:
    """The interface that PipelineTesterMixin expects: build a pipeline with examples, and run it."""

    task: str

    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, **options
    ):
        from transformers import pipeline

        pipe = pipeline(self.task, model=model, image_processor=image_processor, **options)
        assert type(pipe.model) is type(model)
        pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
        return pipe, [Image.fromarray(image) for image in pixels]


class ImageClassificationPipelineTests(PipelineTests):
    task = "image-classification"

    def run_pipeline_test(self, pipe, examples):
        answers = pipe(examples, top_k=3)
        assert len(answers) == len(examples)
        for answer in answers:
            scores = [one["score"] for one in answer]
            assert len(scores) == 3 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1.001
            assert {one["label"] for one in answer} <= set(pipe.model.config.id2label.values())


class ImageFeatureExtractionPipelineTests(PipelineTests):
    task = "image-feature-extraction"

    def run_pipeline_test(self, pipe, examples):
        features = torch.tensor(pipe(examples[0]))
        assert features.shape[0] == 1 and features.shape[2] == pipe.model.config.hidden_size
        assert features.isfinite().all()


def save_tiny_models(folder: Path) -> None:
    """Save what PipelineTesterMixin loads by name: a model and an image processor per class, and a list of them."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    config.num_labels = 5
    summary = {}
    for model_class in (ViTModel, ViTForImageClassification):
        place = folder / "vit" / model_class.__name__
        model_class(config).save_pretrained(place)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(place)
        summary[model_class.__name__] = {"tokenizer_classes": [], "processor_classes": ["ViTImageProcessorPil"]}
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


def import_shared(name: str) -> ModuleType:
    """Import a module of the package."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def install_package() -> None:
    """Make the package importable, and save the models of its pipeline tests in a folder that is deleted at exit."""
    tiny_models = tempfile.TemporaryDirectory()
    atexit.register(tiny_models.cleanup)
    save_tiny_models(Path(tiny_models.name))
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = tiny_models.name
    package = ModuleType(PACKAGE)
    package.__path__ = [str(FOLDER / "tests")]
    sys.modules[PACKAGE] = package
    define_module("exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    define_module("generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    define_module("utils.test_configuration_utils", config_common_kwargs=CONFIG_OPTIONS)
    pipelines = import_shared("test_pipeline_mixin")
    for tests in (ImageClassificationPipelineTests, ImageFeatureExtractionPipelineTests):
        pipelines.pipeline_test_mapping[tests.task] = {"test": f"{__name__}.{tests.__name__}"}


install_package()
