"""attn_implementation="fastvit" in transformers' own models: the same outputs and gradients as its eager attention.

The names in `MODELS`, `REFUSED` and `IGNORED` equal those of the table in docs/drop_in.md.
"""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from test_modeling import randomise, relative_error

import fastvit
from fastvit import ops
from fastvit.models.attention_interface import attention_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {**SMALL, "image_size": 28, "patch_size": 14}
VIDEOS = {**IMAGES, "num_frames": 4, "tubelet_size": 2}
VJEPA2 = {"crop_size": 28, "patch_size": 14, "frames_per_clip": 4, "hidden_size": 64, "num_hidden_layers": 1}
VJEPA2 |= {"num_attention_heads": 2, "mlp_ratio": 1, "pred_hidden_size": 32, "pred_num_attention_heads": 2}
VJEPA2 |= {"pred_num_hidden_layers": 1, "pred_num_mask_tokens": 1}
TEXT = {
    **SMALL,
    "vocab_size": 60,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
GROUPS = {**DECODER, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SEQ2SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1}
SEQ2SEQ |= {name: TEXT[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 1}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MLA |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
MLA |= {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1}
SOUND = {**SMALL, "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "vocab_size": 60}
SOUND |= {"apply_spec_augment": False}


def build_model(name: str, options: dict, config: str = "", **more):
    config_class = getattr(transformers, config or name.removesuffix("Model") + "Config")
    return getattr(transformers, name)(config_class(**{**options, **more}))


# name -> (kind of input, constructor)
MODELS = {
    "ViT": ("images", partial(build_model, "ViTModel", IMAGES)),
    "DeiT": ("images", partial(build_model, "DeiTModel", IMAGES)),
    "ViTMAE": ("images", partial(build_model, "ViTMAEModel", IMAGES, mask_ratio=0.0)),
    "ViTMSN": ("images", partial(build_model, "ViTMSNModel", IMAGES)),
    "I-JEPA": ("images", partial(build_model, "IJepaModel", IMAGES)),
    "BEiT": ("images", partial(build_model, "BeitModel", IMAGES, use_relative_position_bias=True)),
    "DINOv2": ("images", partial(build_model, "Dinov2Model", IMAGES, mlp_ratio=2)),
    "DINOv2 with registers": ("images", partial(build_model, "Dinov2WithRegistersModel", IMAGES, mlp_ratio=2)),
    "DINOv3 ViT": ("images", partial(build_model, "DINOv3ViTModel", IMAGES)),
    "YOLOS": (
        "images",
        partial(build_model, "YolosModel", {**IMAGES, "image_size": [28, 28], "num_detection_tokens": 3}),
    ),
    "DPT": ("images", partial(build_model, "DPTModel", IMAGES, backbone_out_indices=[0, 1, 1, 1])),
    "CLIP vision": ("images", partial(build_model, "CLIPVisionModel", IMAGES)),
    "SigLIP vision": ("images", partial(build_model, "SiglipVisionModel", IMAGES)),
    "SigLIP 2 vision": ("patches", partial(build_model, "Siglip2VisionModel", SMALL, patch_size=14, num_patches=4)),
    "AIMv2 vision": ("images", partial(build_model, "Aimv2VisionModel", IMAGES)),
    "InternVL vision": ("images", partial(build_model, "InternVLVisionModel", {**IMAGES, "image_size": [28, 28]})),
    "Pixtral vision": ("images", partial(build_model, "PixtralVisionModel", IMAGES)),
    "Qwen2.5-VL vision": (
        "grid",
        lambda: transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(
            transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
                hidden_size=32,
                out_hidden_size=32,
                depth=2,
                num_heads=2,
                intermediate_size=48,
                fullatt_block_indexes=[1],
            )
        ),
    ),
    "VideoMAE": ("videos", partial(build_model, "VideoMAEModel", VIDEOS)),
    "V-JEPA 2": ("videos", partial(build_model, "VJEPA2Model", VJEPA2)),
    "BERT": ("text", partial(build_model, "BertModel", TEXT)),
    "ModernBERT": (
        "text",
        partial(build_model, "ModernBertModel", TEXT, local_attention=4, cls_token_id=1, sep_token_id=2),
    ),
    "CLIP text": ("text", partial(build_model, "CLIPTextModel", TEXT)),
    "SigLIP text": ("text", partial(build_model, "SiglipTextModel", TEXT)),
    "GPT-2": ("text", partial(build_model, "GPT2Model", TEXT, n_embd=32, n_layer=2, n_head=2)),
    "Llama": ("text", partial(build_model, "LlamaModel", DECODER)),
    "Mistral": ("text", partial(build_model, "MistralModel", DECODER, sliding_window=4)),
    "Qwen3": ("text", partial(build_model, "Qwen3Model", DECODER)),
    "Gemma 3 text": ("text", partial(build_model, "Gemma3TextModel", GROUPS)),
    "DeepSeek-V3": ("text", partial(build_model, "DeepseekV3Model", MLA)),
    "BART": ("text to text", partial(build_model, "BartModel", SEQ2SEQ, max_position_embeddings=16)),
    "T5": ("text to text", partial(build_model, "T5Model", {**T5, "vocab_size": 60, "pad_token_id": 0})),
    "Whisper": (
        "sound features",
        partial(build_model, "WhisperModel", SEQ2SEQ, num_mel_bins=8, max_source_positions=8, max_target_positions=16),
    ),
    "Wav2Vec2": ("sound", partial(build_model, "Wav2Vec2Model", SOUND)),
}

# name -> (option that fastvit does not support, constructor)
REFUSED = {
    "Gemma 2": ("softcap", partial(build_model, "Gemma2Model", GROUPS)),
    "GPT-OSS": ("s_aux", partial(build_model, "GptOssModel", GROUPS, num_local_experts=2, num_experts_per_tok=1)),
    "DeepSeek-V3.2": ("indices", partial(build_model, "DeepseekV32Model", MLA, index_topk=3)),
}
# Their blocks use no attention function, only a mask: the implementation's name has no effect.
IGNORED = {
    "GIT": ("text", partial(build_model, "GitModel", TEXT, vision_config=IMAGES)),
    "SAM vision": ("images", partial(build_model, "SamVisionModel", IMAGES, output_channels=16)),
}
# The kernel needs one head dim for queries, keys and values; PyTorch's operation does not.
NO_KERNEL = ("DeepSeek-V3",)
# A position bias is passed as a mask, for which the kernel has no gradient; PyTorch's operation has.
LEARNED_BIAS = ("BEiT", "T5")
CASES = [(name, "", backend) for name in [*MODELS, "GIT"] for backend in ("reference", "triton")]
CASES += [(name, side, "reference") for name in MODELS for side in ("left", "right") if MODELS[name][0] == "text"]
CASES += [(name, "right", "reference") for name in ("BART", "T5", "GIT")]
CASES += [("ModernBERT", "left", "triton"), ("Llama", "left", "triton"), ("T5", "right", "triton")]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])

# A mask of the most negative number times log2(e) overflows to minus infinity, which is the intended value.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _registered(backend):
    if backend == "triton" and ops.triton_unavailable_reason():
        pytest.skip("Triton is not installed")
    fastvit.register_attention()
    with fastvit.backend(backend):
        yield


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = {**MODELS, **REFUSED, **IGNORED}[name][1]().to(DEVICE).eval()
    randomise(model)
    return model


def make_text(padded: str = "") -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, slice(0, 5) if padded == "left" else slice(7, 12)] = 0
    tokens = torch.where(mask == 1, tokens, 0)
    tokens[:, 11] = 2
    return {"input_ids": tokens.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def make_inputs(given: str, padded: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    if given == "images":
        return {"pixel_values": noise(2, 3, 28, 28)}
    if given == "videos":
        return {"videos": noise(2, 4, 3, 28, 28)}
    if given == "sound":
        return {"input_values": noise(2, 200)}
    if given == "patches":  # one image of 2 x 2 patches and one of 1 x 3
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=DEVICE)
        shapes = torch.tensor([[2, 2], [1, 3]], device=DEVICE)
        return {"pixel_values": noise(2, 4, 588), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if given == "grid":  # two images, packed
        return {"hidden_states": noise(32, 1176), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]], device=DEVICE)}
    target = {"decoder_input_ids": torch.randint(3, 60, (2, 7), generator=generator).to(DEVICE)}
    if given == "sound features":
        return {"input_features": noise(2, 8, 16), **target}
    return {**make_text(padded), **(target if given == "text to text" else {})}


def call(model, inputs):
    """Return the last hidden state, with padding tokens set to zero."""
    inputs = dict(inputs)
    if "videos" in inputs:
        inputs[model.main_input_name] = inputs.pop("videos")
    hidden = model(**inputs)[0]
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    if mask is not None and "decoder_input_ids" not in inputs:
        hidden = hidden[:, -mask.shape[1] :] * mask[..., None]
    return hidden


def compute_hidden_states_and_gradients(model, implementation: str, inputs) -> dict[str, torch.Tensor]:
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    torch.manual_seed(2)
    hidden = call(model, inputs)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names, parameters = zip(*named, strict=True)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    gradients = torch.autograd.grad((hidden * weights).sum(), parameters, allow_unused=True)
    found = {name: grad for name, grad in zip(names, gradients, strict=True) if grad is not None}
    return {"last hidden state": hidden.detach(), **found}


@pytest.mark.parametrize(("name", "padded", "backend"), CASES)
def test_models_of_transformers_compute_the_same(name, padded, backend, monkeypatch):
    if name == "T5" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("T5 uses no attention function in this transformers")
    model = build(name)
    inputs = make_inputs({**MODELS, **IGNORED}[name][0], padded)
    if backend == "triton" and name in LEARNED_BIAS:
        with pytest.raises(fastvit.InputError, match="no gradient of an additive mask, and mask requires one"):
            compute_hidden_states_and_gradients(model, "fastvit", inputs)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("relative" not in parameter_name)
    expected = compute_hidden_states_and_gradients(model, "eager", inputs)
    calls = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs))
    if backend == "triton" and name in NO_KERNEL:
        with pytest.raises(fastvit.InputError, match="one head dim for queries and values, not 32 and 16"):
            compute_hidden_states_and_gradients(model, "fastvit", inputs)
        return
    found = compute_hidden_states_and_gradients(model, "fastvit", inputs)
    assert bool(calls) == (name in MODELS)
    assert found.keys() == expected.keys()
    assert relative_error(found["last hidden state"], expected["last hidden state"]) < 1e-5
    # The gradient of a key bias is only rounding error (softmax is invariant to a shift): relative to the largest one.
    largest = max(gradient.norm() for tensor, gradient in expected.items() if tensor != "last hidden state")
    for tensor, gradient in expected.items():
        assert (found[tensor] - gradient).norm() < 1e-5 * max(gradient.norm(), 0.1 * largest), tensor


@BACKENDS
@pytest.mark.parametrize("name", REFUSED)
def test_models_with_unsupported_options_raise_an_error(name, backend):
    option, _ = REFUSED[name]
    model = build(name)
    model.set_attn_implementation("fastvit")
    with pytest.raises(fastvit.InputError, match=rf"'fastvit' does not support {option}, which \w+Attention passes"):
        model(**make_text())


@pytest.mark.parametrize("backend", ["reference"])
def test_model_without_attention_function_ignores_the_name_or_raises(backend, monkeypatch):
    model = build("SAM vision")
    inputs = make_inputs("images")
    expected = model(**inputs)[0]
    monkeypatch.setattr(ops, "attention", None)
    model.set_attn_implementation("fastvit")
    assert torch.equal(model(**inputs)[0], expected)
    with pytest.raises(KeyError, match="fastvit"):
        transformers.SamVisionModel._from_config(model.config, attn_implementation="fastvit")


@pytest.mark.parametrize("backend", ["reference"])
def test_documented_models_are_the_tested_ones(backend):
    page = (Path(__file__).parent.parent / "docs" / "drop_in.md").read_text(encoding="utf-8")
    table = page.partition('## `attn_implementation="fastvit"`')[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (computes the same|is an error|ignores the name) \| (.*?) \|", table, re.MULTILINE))
    tables = {"computes the same": MODELS, "is an error": REFUSED, "ignores the name": IGNORED}
    for outcome, models in tables.items():
        named = re.sub(r" \([^)]*\)", "", rows[outcome])
        assert re.split(r"[,;] ", named) == list(models), outcome


@BACKENDS
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3 text"])
def test_generated_text_equals_eager_attention(name, cache, backend):
    """With a cache of keys and values, and a batch of two texts of which one is padded."""
    causal = {"Llama": "LlamaForCausalLM", "Gemma 3 text": "Gemma3ForCausalLM"}[name]
    torch.manual_seed(0)
    model = getattr(transformers, causal)(build(name).config).to(DEVICE).eval()
    randomise(model)
    generated = []
    for implementation in ("eager", "fastvit"):
        model.set_attn_implementation(implementation)
        found = model.generate(
            **make_text("left"), max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation=cache,
            output_logits=True, return_dict_in_generate=True, disable_compile=True,
        )  # fmt: skip
        generated.append((found.sequences, torch.stack(found.logits)))
    (tokens, logits), (our_tokens, our_logits) = generated
    assert torch.equal(tokens, our_tokens)
    assert relative_error(our_logits, logits) < 1e-5


@pytest.mark.parametrize("backend", ["reference"])
def test_texts_packed_by_position_ids_do_not_attend_to_each_other(backend):
    model = build("Llama")
    model.set_attn_implementation("fastvit")
    tokens, positions = make_text()["input_ids"][:1], torch.tensor([[*range(7), *range(5)]], device=DEVICE)
    packed = model(tokens, position_ids=positions, use_cache=False).last_hidden_state
    alone = [model(part).last_hidden_state for part in tokens.split([7, 5], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@BACKENDS
def test_attention_mask_is_applied(backend):
    """Without a registered mask function, transformers would pass no mask at all."""
    model = build("CLIP text")
    model.set_attn_implementation("fastvit")
    inputs = make_text()
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 8] = 5
    before, after = (model(**given).last_hidden_state for given in (inputs, changed))
    assert torch.equal(before[:, :8], after[:, :8])  # causal: no token attends to a later one
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@BACKENDS
def test_attention_maps_equal_eager(backend):
    model = build("ViT")
    inputs = make_inputs("images")
    maps = {}
    for implementation in ("eager", "fastvit"):
        model.set_attn_implementation(implementation)
        maps[implementation] = model(**inputs, output_attentions=True).attentions
    for ours, theirs in zip(maps["fastvit"], maps["eager"], strict=True):
        torch.testing.assert_close(ours, theirs)


@BACKENDS
def test_grouped_heads_position_bias_and_causal_mask_equal_pytorch(backend):
    query = torch.randn(2, 4, 6, 16, device=DEVICE)
    key, value = (torch.randn(2, 2, 6, 16, device=DEVICE) for _ in range(2))
    bias, mask = torch.randn(4, 6, 6, device=DEVICE), torch.rand(2, 1, 6, 6, device=DEVICE) < 0.7
    mask[..., 0] = True
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    module = torch.nn.Identity()
    for given, expected in (
        ({"attention_mask": None, "is_causal": True}, {"is_causal": True}),
        ({"attention_mask": mask}, {"attn_mask": mask}),
        ({"attention_mask": None, "position_bias": bias}, {"attn_mask": bias}),
        (
            {"attention_mask": mask, "position_bias": bias},
            {"attn_mask": torch.where(mask, bias, torch.tensor(float("-inf"), device=DEVICE))},
        ),
    ):
        found, _ = attention_forward(module, query, key, value, **given)
        theirs = torch.nn.functional.scaled_dot_product_attention(query, *repeated, **expected)
        torch.testing.assert_close(found, theirs.transpose(1, 2), rtol=1e-4, atol=1e-5)


@BACKENDS
def test_unsupported_options_are_named(backend):
    """An option that is not known to be harmless is an error."""
    tensor = torch.randn(1, 1, 2, 16, device=DEVICE)
    for option, value in (("softcap", 30.0), ("cu_seq_lens_q", torch.tensor([0, 1, 2])), ("new_idea", True)):
        with pytest.raises(fastvit.InputError, match=f"'fastvit' does not support {option}, which Identity passes"):
            attention_forward(torch.nn.Identity(), tensor, tensor, tensor, None, **{option: value})
    attention_forward(torch.nn.Identity(), tensor, tensor, tensor, None, softcap=None, use_cache=True, new_idea=False)


@BACKENDS
def test_own_model_accepts_the_name(backend):
    model = fastvit.ViTModel(transformers.ViTConfig(**IMAGES), add_pooling_layer=False).to(DEVICE).eval()
    inputs = make_inputs("images")
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("fastvit")
    assert torch.equal(model(**inputs).last_hidden_state, expected)
