"""The small ViTs that transformers' shared tests run on, and the tests that are specific to ViT.

Subclasses of `ViTTests` set the model classes, so that fastvit's and transformers' run the same tests.
"""

import unittest
from dataclasses import dataclass
from typing import Any

import torch
from compat import upstream
from transformers import PreTrainedModel, ViTConfig
from transformers.testing_utils import torch_device

common = upstream.import_shared("test_modeling_common")
configuration = upstream.import_shared("test_configuration_common")
pipelines = upstream.import_shared("test_pipeline_mixin")


@dataclass
class ViTModelTester:
    """Builds configs and inputs; the shared tests read its fields by name."""

    parent: unittest.TestCase
    model_classes: tuple[type[PreTrainedModel], ...]
    batch_size: int = 5
    image_size: int = 14
    patch_size: int = 2
    num_channels: int = 3
    is_training: bool = True
    use_labels: bool = True
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 37
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    type_sequence_label_size: int = 10
    initializer_range: float = 0.02
    encoder_stride: int = 2
    mask_ratio: float = 0.5
    attn_implementation: str = "eager"

    @property
    def mask_length(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def seq_length(self) -> int:
        """Number of tokens: the patches and the class token."""
        return self.mask_length + 1

    @property
    def num_masks(self) -> int:
        """Number of patches that masked image modelling masks."""
        return int(self.mask_ratio * self.seq_length)

    def get_config(self) -> ViTConfig:
        names = (
            "image_size patch_size num_channels hidden_size num_hidden_layers num_attention_heads intermediate_size"
            " hidden_act hidden_dropout_prob attention_probs_dropout_prob initializer_range encoder_stride"
            " attn_implementation"
        )
        return ViTConfig(**{name: getattr(self, name) for name in names.split()})

    def make_pixels(self, num_channels: int) -> torch.Tensor:
        return common.floats_tensor([self.batch_size, num_channels, self.image_size, self.image_size])

    def prepare_config_and_inputs(self) -> tuple[ViTConfig, torch.Tensor, torch.Tensor | None]:
        labels = common.ids_tensor([self.batch_size], self.type_sequence_label_size) if self.use_labels else None
        return self.get_config(), self.make_pixels(self.num_channels), labels

    def prepare_config_and_inputs_for_common(self) -> tuple[ViTConfig, dict[str, Any]]:
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}

    def make_mask(self) -> torch.Tensor:
        """Return a mask of `num_masks` random patches of every image."""
        ranks = torch.rand(self.batch_size, self.mask_length, device=torch_device).argsort(dim=1).argsort(dim=1)
        return ranks < self.num_masks


class ViTTests:
    """Tests of a ViT beyond the shared ones. `all_model_classes`: backbone, classifier, masked image model."""

    test_resize_embeddings = False  # tokens are patches: there is no vocabulary

    def setUp(self) -> None:
        self.model_tester = ViTModelTester(self, self.all_model_classes)
        self.config_tester = configuration.ConfigTester(
            self, config_class=ViTConfig, has_text_modality=False, hidden_size=37
        )

    @unittest.skip("ViT accepts pixel_values, not inputs_embeds")
    def test_inputs_embeds(self) -> None: ...

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self) -> None:
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())

    def build_model(self, model_class: type[PreTrainedModel], config: ViTConfig) -> PreTrainedModel:
        torch.manual_seed(0)
        return model_class(config).to(torch_device).eval()

    def test_model(self) -> None:
        config, pixel_values, _ = self.model_tester.prepare_config_and_inputs()
        tokens = self.build_model(self.all_model_classes[0], config)(pixel_values).last_hidden_state
        tester = self.model_tester
        self.assertEqual(tokens.shape, (tester.batch_size, tester.seq_length, tester.hidden_size))

    def test_for_image_classification(self) -> None:
        tester = self.model_tester
        for num_channels in (tester.num_channels, 1):
            config, _, labels = tester.prepare_config_and_inputs()
            config.num_channels, config.num_labels = num_channels, tester.type_sequence_label_size
            outputs = self.build_model(self.all_model_classes[1], config)(
                tester.make_pixels(num_channels), labels=labels
            )
            self.assertEqual(outputs.logits.shape, (tester.batch_size, tester.type_sequence_label_size))
            self.assertTrue(outputs.loss.isfinite())

    def test_for_masked_image_modeling(self) -> None:
        tester = self.model_tester
        mask = tester.make_mask()
        self.assertTrue((mask.sum(dim=1) == tester.num_masks).all())
        for num_channels in (tester.num_channels, 1):
            config, _, _ = tester.prepare_config_and_inputs()
            config.num_channels = num_channels
            pixels = tester.make_pixels(num_channels)
            model = self.build_model(self.all_model_classes[2], config)
            whole, masked = model(pixels), model(pixels, bool_masked_pos=mask)
            self.assertIsNone(whole.loss)
            self.assertEqual(whole.reconstruction.shape, pixels.shape)
            # The loss is the mean error over the pixels of the masked patches only.
            hidden = mask.view(-1, 1, *(tester.image_size // tester.patch_size,) * 2)
            hidden = hidden.repeat_interleave(tester.patch_size, 2).repeat_interleave(tester.patch_size, 3)
            error = (masked.reconstruction - pixels).abs()[hidden.expand_as(pixels)].mean()
            torch.testing.assert_close(masked.loss, error, rtol=1e-4, atol=1e-5)

    def test_interpolates_position_embeddings(self) -> None:
        config, _, _ = self.model_tester.prepare_config_and_inputs()
        model = self.build_model(self.all_model_classes[0], config)
        larger = common.floats_tensor([2, 3, 24, 20])
        tokens = model(larger, interpolate_pos_encoding=True).last_hidden_state
        self.assertEqual(tokens.shape, (2, 12 * 10 + 1, self.model_tester.hidden_size))
        with self.assertRaises(ValueError):
            model(larger)

    def test_export(self) -> None:
        """The program of torch.export with a dynamic batch size computes the same."""
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = self.build_model(model_class, config)
            batch = torch.export.Dim("batch")
            with torch.no_grad():
                program = torch.export.export(
                    model, (), inputs, dynamic_shapes={"pixel_values": {0: batch}}, strict=False
                ).module()
                for size in (self.model_tester.batch_size, 2):
                    pixels = inputs["pixel_values"][:size]
                    torch.testing.assert_close(program(pixel_values=pixels)[0], model(pixels)[0])
