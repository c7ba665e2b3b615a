"""transformers' shared test classes, run on its own ViT, which is the baseline, and on fastvit's.

conftest.py compares the outcomes test by test and fails the run if fastvit does not pass a test that the baseline
passes. differences.py lists the exceptions.
"""

import unittest

import pytest
import transformers
from compat.differences import DIFFERENCES
from compat.vit_tester import ViTTests, common, pipelines

import fastvit


class TestTransformersViT(ViTTests, common.ModelTesterMixin, pipelines.PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (
        transformers.ViTModel,
        transformers.ViTForImageClassification,
        transformers.ViTForMaskedImageModeling,
    )
    pipeline_model_mapping = {  # noqa: RUF012
        "image-feature-extraction": transformers.ViTModel,
        "image-classification": transformers.ViTForImageClassification,
    }


class TestFastViT(ViTTests, common.ModelTesterMixin, pipelines.PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (fastvit.ViTModel, fastvit.ViTForImageClassification, fastvit.ViTForMaskedImageModeling)
    pipeline_model_mapping = {  # noqa: RUF012
        "image-feature-extraction": fastvit.ViTModel,
        "image-classification": fastvit.ViTForImageClassification,
    }


for name, (kind, reason) in DIFFERENCES.items():
    if kind == "fails":
        setattr(TestFastViT, name, pytest.mark.xfail(reason=reason, strict=True)(getattr(TestFastViT, name)))
