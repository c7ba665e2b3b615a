"""Everyday uses of a transformers model, on fastvit's classes: loading, saving, training, wrapping, exporting.

The tests of ONNX, torchao and bitsandbytes are skipped where the package is not installed.
"""

import copy
import io
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling, ViTConfig

import fastvit

CONFIG = {
    "image_size": 16,
    "patch_size": 8,
    "encoder_stride": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
}
CLASSES = ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling")


def build_model(class_name: str = "ViTForImageClassification", **options) -> transformers.PreTrainedModel:
    """Build a model with perturbed weights: with the initial ones a lost bias would go unnoticed."""
    generator = torch.Generator().manual_seed(7)
    model = getattr(fastvit, class_name)(ViTConfig(**{**CONFIG, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return build_model()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 0])
load = fastvit.ViTForImageClassification.from_pretrained


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads_in_half_precision(dtype, model, folder, pixels):
    half = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    logits = half(pixels).logits  # float32 pixels, as with transformers' class
    assert logits.dtype == dtype
    assert torch.equal(logits, copy.deepcopy(model).to(dtype)(pixels.to(dtype)).logits)


def test_dtype_auto_selects_the_saved_dtype(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_places_the_model(device_map, model, folder, pixels):
    placed = load(folder, device_map=device_map)
    assert placed.device.type == ("cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu")
    torch.testing.assert_close(placed.cpu()(pixels).logits, model(pixels).logits)


def test_revision_selects_the_commit_that_is_loaded(model, tmp_path, pixels):
    """Two commits in the cache, laid out as a download leaves them; selected by branch, tag and hash."""
    repository = tmp_path / "models--leaves--vit"
    expected = {}
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        with torch.no_grad():
            model.classifier.bias.add_(1)
        model.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        expected[revision] = expected[commit] = model(pixels).logits.detach()
    assert not torch.equal(expected["main"], expected["v2"])
    for revision, logits in expected.items():
        torch.testing.assert_close(load("leaves/vit", cache_dir=tmp_path, revision=revision)(pixels).logits, logits)
    torch.testing.assert_close(load("leaves/vit", cache_dir=tmp_path)(pixels).logits, expected["main"])
    with pytest.raises(OSError, match="find them in the cached files"):
        load("leaves/vit", cache_dir=tmp_path, revision="v3")


def test_blocks_offloaded_to_disk_compute_the_same(model, folder, tmp_path, pixels):
    device_map = {
        "vit.embeddings": "cpu",
        "vit.encoder.layer.0": "disk",
        "vit.encoder.layer.1": "cpu",
        "vit.layernorm": "cpu",
        "classifier": "cpu",
    }
    offloaded = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert next(offloaded.vit.encoder.layer[0].parameters()).device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(offloaded(pixels).logits, model(pixels).logits)


def test_head_of_another_size_needs_ignore_mismatched_sizes(model, folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder, num_labels=7)
    resized = load(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert resized.classifier.weight.shape == (7, 32) and resized.config.num_labels == 7
    assert torch.equal(resized.vit.embeddings.cls_token, model.vit.embeddings.cls_token)


def test_label_names_given_on_loading_are_saved(folder, tmp_path):
    names = {0: "healthy", 1: "rust", 2: "spot"}
    named = load(folder, id2label=names, label2id={name: index for index, name in names.items()})
    named.save_pretrained(tmp_path / "named")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "named")
    assert again.config.id2label == names and again.config.label2id["rust"] == 1


def test_sharded_checkpoint_loads(model, tmp_path, pixels):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(load(tmp_path)(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("class_name", CLASSES)
def test_state_dict_of_transformers_loads(class_name, pixels):
    """Its names differ from the hub's, which are ours."""
    theirs = getattr(transformers, class_name)(build_model(class_name).config).eval()
    assert any(".q_proj." in name for name in theirs.state_dict())
    ours = build_model(class_name)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(pixels)[0], theirs(pixels)[0])
    with pytest.raises(RuntimeError, match=r"layers\.9\.attention\.query"):
        ours.load_state_dict({**theirs.state_dict(), "layers.9.attention.query": torch.zeros(1)})


@pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "is_custom_code"),
    reason="this transformers applies its own renames to classes of other packages with the same name",
)
@pytest.mark.parametrize("class_name", CLASSES)
def test_folder_under_transformers_names_loads_and_is_saved_under_the_hubs(class_name, tmp_path, pixels):
    theirs = getattr(transformers, class_name)(build_model(class_name).config).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    assert any(".q_proj." in name for name in load_file(tmp_path / "theirs" / "model.safetensors"))
    ours = getattr(fastvit, class_name).from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(ours(pixels)[0], theirs(pixels)[0])
    ours.save_pretrained(tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == ours.state_dict().keys()


def test_push_to_hub_uploads_the_saved_files(model, folder):
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return mock.Mock(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **_):
            for operation in operations:
                with operation.as_file() as file:
                    uploaded[operation.path_in_repo] = file.read()

        def __getattr__(self, name):
            return mock.Mock()

    with mock.patch("transformers.utils.hub.hf_api", return_value=Hub()):
        model.push_to_hub("leaves/vit", commit_message="first")
    assert {"model.safetensors", "config.json"} <= uploaded.keys()
    assert uploaded["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert uploaded["config.json"] == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("class_name", CLASSES)
def test_model_built_on_the_meta_device_loads_a_state_dict(class_name):
    original = build_model(class_name)
    with torch.device("meta"):
        empty = getattr(fastvit, class_name)(original.config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert empty.state_dict().keys() == original.state_dict().keys()
    empty.to_empty(device="cpu").load_state_dict(original.state_dict())
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(empty.eval()(pixels)[0], original(pixels)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The Auto classes and pipelines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    fastvit.register()
    yield
    fastvit.unregister()


AUTO = {
    "ViTModel": AutoModel,
    "ViTForImageClassification": AutoModelForImageClassification,
    "ViTForMaskedImageModeling": AutoModelForMaskedImageModeling,
}


@pytest.mark.parametrize("class_name", CLASSES)
def test_auto_classes_load_ours_once_registered(class_name, registered, tmp_path):
    saved = build_model(class_name)
    saved.save_pretrained(tmp_path)
    auto_class = AUTO[class_name]
    fastvit.register()  # a second call is harmless
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is getattr(fastvit, class_name)
    assert type(auto_class.from_config(saved.config)) is getattr(fastvit, class_name)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(pixels)[0], saved(pixels)[0])
    fastvit.unregister()
    assert type(auto_class.from_pretrained(tmp_path)) is getattr(transformers, class_name)


def test_registering_does_not_affect_other_models(registered):
    config = transformers.DeiTConfig(**CONFIG)
    assert type(AutoModel.from_config(config)) is transformers.DeiTModel


@pytest.fixture
def image_processor():
    return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture
def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_image_classification_pipeline_equals_transformers(model, image_processor, images, folder):
    theirs = transformers.ViTForImageClassification.from_pretrained(folder)
    found, expected = (
        transformers.pipeline("image-classification", model=either, image_processor=image_processor)(images)
        for either in (model, theirs)
    )
    for ours, other in zip(found, expected, strict=True):
        assert [row["label"] for row in ours] == [row["label"] for row in other]
        assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in other], abs=1e-5)


def test_pipeline_of_a_folder_uses_our_class_once_registered(registered, folder, image_processor, images):
    image_processor.save_pretrained(folder)
    pipe = transformers.pipeline("image-classification", model=str(folder), image_processor=image_processor)
    assert type(pipe.model) is fastvit.ViTForImageClassification
    assert len(pipe(images, batch_size=2)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class PixelDataset(torch.utils.data.Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": LABELS[index]}


def test_trainer_trains_saves_and_resumes(model, pixels, tmp_path):
    before = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=PixelDataset(pixels), eval_dataset=PixelDataset(pixels)
    )
    trainer.train()
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(before)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(PixelDataset(pixels)).predictions.shape == (4, 3)
    torch.testing.assert_close(load(tmp_path / "checkpoint-1")(pixels).logits, model.eval()(pixels).logits)
    arguments.max_steps = 2
    assert trainer.train(resume_from_checkpoint=True).global_step == 2


def compute_gradients(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor = LABELS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(pixels, labels=labels).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_accelerate_prepares_and_trains(model, pixels):
    from accelerate import Accelerator

    expected = compute_gradients(copy.deepcopy(model), pixels)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(pixels, labels=LABELS).loss)
    for name, parameter in accelerator.unwrap_model(prepared).named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    before = prepared.classifier.weight.clone()
    optimizer.step()
    assert not torch.equal(prepared.classifier.weight, before)


def test_deepspeed_fills_its_config_from_the_model(model):
    """The part of transformers' DeepSpeed support that reads the model; it runs without the package."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from transformers.integrations import deepspeed

    class Config(deepspeed.HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
        pass

    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    filled = []
    for one in (model, transformers.ViTForImageClassification(model.config)):
        given = {"zero_optimization": {"stage": 3, **dict.fromkeys(sizes, "auto")}, "train_batch_size": 4}
        with mock.patch.multiple(deepspeed, dep_version_check=mock.Mock(), set_hf_deepspeed_config=mock.Mock()):
            config = Config(given)
        config.trainer_config_finalize(transformers.TrainingArguments(report_to=[], use_cpu=True), one, 10)
        filled.append(config.config["zero_optimization"])
    assert filled[0] == filled[1]
    assert [filled[0][size] for size in sizes] == [32 * 32, int(0.9 * 32 * 32), 10 * 32]


def test_lora_on_query_and_value_trains_saves_and_merges(model, pixels, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    original = copy.deepcopy(model)
    lora = get_peft_model(model, LoraConfig(target_modules=["query", "value"], r=4, modules_to_save=["classifier"]))
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step changes only B: the gradient of A is zero while B is zero
        optimizer.zero_grad()
        loss = lora(pixels, labels=LABELS).loss
        loss.backward()
        optimizer.step()
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained if ".lora_" in name} == {"query", "value"}
    assert all(p.grad.abs().sum() > 0 for n, p in lora.named_parameters() if "lora_" in n)
    expected = lora.eval()(pixels).logits
    assert not torch.allclose(expected, original(pixels).logits, atol=1e-3)
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(original, tmp_path).eval()
    torch.testing.assert_close(loaded(pixels).logits, expected)
    merged = lora.merge_and_unload()
    assert type(merged.vit.encoder.layer[0].attention.attention.query) is nn.Linear
    torch.testing.assert_close(merged(pixels).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_computes_the_same_gradients(use_reentrant, model, pixels):
    expected = compute_gradients(copy.deepcopy(model).train(), pixels)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    found = compute_gradients(model, pixels)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model.vit.encoder.layer)


def test_autocast_trains_in_bfloat16(model, pixels):
    exact = compute_gradients(model, pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = compute_gradients(model, pixels)
    for name, gradient in exact.items():
        if not name.endswith("key.bias"):  # zero in exact arithmetic
            assert rounded[name].dtype == torch.float32
            assert (rounded[name] - gradient).norm() < 0.05 * gradient.norm(), name


def run_two_processes(mode: str, backend: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_INTERPRET"] = str(int(backend == "triton"))
    script = Path(__file__).with_name("distributed_step.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), mode, backend],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "same gradients" in output, output[-3000:]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_two_processes_compute_the_gradients_of_one(mode, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    run_two_processes(mode, backend)


# ---------------------------------------------------------------------------------------------------------------------
# Wrapping, copying, inspecting
# ---------------------------------------------------------------------------------------------------------------------


def test_attention_implementations_agree(model, pixels):
    logits = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        logits[name] = model(pixels).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_attention_maps_are_distributions(attn_implementation, folder, pixels):
    model = load(folder, attn_implementation=attn_implementation)
    outputs = model(pixels, output_attentions=True)
    assert len(outputs.attentions) == 2
    for attention in outputs.attentions:
        assert attention.shape == (4, 4, 5, 5)
        torch.testing.assert_close(attention.sum(-1), torch.ones(4, 4, 5))
    torch.testing.assert_close(outputs.logits, model(pixels).logits)


def test_hidden_states_can_be_selected_by_index(model, pixels):
    every = model(pixels, output_hidden_states=True).hidden_states
    assert len(every) == 3 and all(one is not None for one in every)
    for requested, found in ((-1, {2}), (1, {1}), ([0, 2], {0, 2}), ([-3, 7], {0})):
        some = model(pixels, output_hidden_states=requested).hidden_states
        assert {index for index, one in enumerate(some) if one is not None} == found
        for index in found:
            torch.testing.assert_close(some[index], every[index])


def test_deep_copy_is_independent(model, pixels):
    before = model(pixels).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(pixels).logits, before)
    nn.init.zeros_(twin.classifier.weight)
    assert torch.equal(model(pixels).logits, before)


@pytest.mark.parametrize("class_name", CLASSES)
def test_pickled_models_compute_the_same(class_name, pixels):
    model = build_model(class_name)
    twins = [pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    for twin in twins:
        assert torch.equal(twin(pixels)[0], model(pixels)[0])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "name",
    [
        "vit.embeddings.patch_embeddings.projection",
        "vit.encoder.layer.0.attention.attention.query",
        "vit.encoder.layer.0.attention.output.dense",
        "vit.encoder.layer.1.intermediate.dense",
        "vit.encoder.layer.1.output.dense",
        "vit.encoder.layer.1.layernorm_before",
        "vit.layernorm",
        "classifier",
    ],
)
def test_parametrized_weight_is_used(name, model, pixels):
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        doubled.get_submodule(name).weight.mul_(2)
    nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
    torch.testing.assert_close(model(pixels).logits, doubled(pixels).logits)
    model(pixels, labels=LABELS).loss.backward()
    assert model.get_submodule(name).parametrizations.weight.original.grad.abs().sum() > 0


def test_replaced_module_is_called(model, pixels):
    expected = model(pixels).logits
    called = []

    class Watched(nn.Linear):
        def forward(self, x):
            called.append(x.shape)
            return super().forward(x)

    for layer in model.vit.encoder.layer:
        for parent, name in ((layer.attention.attention, "key"), (layer.intermediate, "dense")):
            old = getattr(parent, name)
            new = Watched(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            setattr(parent, name, new)
    torch.testing.assert_close(model(pixels).logits, expected)
    assert len(called) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Compiling, exporting, quantising
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", CLASSES)
def test_compiled_model_computes_the_same(class_name, pixels):
    model = build_model(class_name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels)[0], model(pixels)[0])


@pytest.mark.parametrize("class_name", CLASSES)
def test_exported_program_accepts_any_batch_size(class_name, pixels):
    model = build_model(class_name)
    with torch.no_grad():
        program = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        for batch in (1, 3):
            torch.testing.assert_close(loaded(pixels[:batch])[0], model(pixels[:batch])[0])


def test_onnx_export_computes_the_same(model, pixels, tmp_path):
    onnx = pytest.importorskip("onnx", reason="ONNX export needs the package onnx")
    pytest.importorskip("onnxscript", reason="ONNX export needs the package onnxscript")
    with fastvit.backend("reference"), torch.no_grad():
        program = torch.onnx.export(
            model, (pixels,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        )
    program.save(tmp_path / "model.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))
    from onnx.reference import ReferenceEvaluator

    run = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    for batch in (4, 2):
        (logits,) = run.run(None, {run.input_names[0]: pixels[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(pixels[:batch]).logits, rtol=1e-4, atol=1e-5)


def test_torchao_int8_weights_are_close(model, pixels):
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need the package torchao")
    expected = model(pixels).logits
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    weight = model.vit.encoder.layer[0].attention.attention.query.weight
    assert type(weight) is not nn.Parameter and type(weight.data) is not torch.Tensor
    logits = model(pixels).logits
    assert not torch.equal(logits, expected)
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_bitsandbytes_int8_weights_are_close(folder, model, pixels):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="8-bit loading needs the package bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    quantised = load(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
    assert type(quantised.vit.encoder.layer[0].intermediate.dense) is bitsandbytes.nn.Linear8bitLt
    expected = model(pixels).logits
    assert (quantised(pixels).logits - expected).norm() < 0.1 * expected.norm()
