"""Checkpoints that are broken or malicious: refused with one clear message, without running code."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from functools import partial
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig

from fastvit import ViTForImageClassification, cli
from fastvit.checkpoints.configuration import SIZE_LIMITS, format_value, read_json
from fastvit.checkpoints.convert import convert
from fastvit.checkpoints.inspection import check_checkpoint, read_config
from fastvit.data import leaves
from fastvit.errors import InputError, escape_unprintable
from fastvit.models.loading import load_pretrained
from fastvit.serve.predictor import check_compatibility
from fastvit.serve.preprocessing import Preprocessor, load_preprocessor

pytestmark = [hostile.LINUX, pytest.mark.usefixtures("own_folder")]

NAN = math.nan
SMALL_MEMORY = 300 * 2**20


@pytest.fixture
def model(tmp_path) -> Path:
    return hostile.write_files(tmp_path / "model", hostile.build_checkpoint())


def load(folder: Path) -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(folder)


def load_with_preprocessor(folder: Path) -> Preprocessor:
    """The preprocessor of a checkpoint, checked against the model as a predictor does."""
    model, preprocessor = load(folder), load_preprocessor(str(folder))
    check_compatibility(model, preprocessor)
    return preprocessor


def load_for_finetuning(folder: Path) -> None:
    load_pretrained(str(folder), ignore_mismatched_sizes=True)  # transformers then ignores other shapes


READERS = (load, load_for_finetuning, partial(convert, dest="converted"))

# --- config.json -----------------------------------------------------------------------------------------------------

# Each message has the key, what was expected and the value, unless another pattern follows.
BAD_CONFIGS = [
    *((key, value) for key in hostile.CONFIG if key in SIZE_LIMITS and key != "num_labels"
      for value in (10**9, 10**4000, 0, -32, "32", NAN, True, 32.0, None, [], {})),
    *(("image_size", value) for value in ([16, 16, 16], ["16", "16"], [16, -16], [10**9, 1])),
    ("image_size", 4, r"image_size: expected room for one patch of \(8, 8\), got \(4, 4\)"),
    *(("num_labels", value) for value in (10**9, -1, "3", 1.5)),
    *(("id2label", value) for value in (["a"], "abc")),
    *(("id2label", value, "id2label: expected numbers and names, got '")
      for value in ({"a": "b"}, {"0": {}}, {"9" * 5000: "a"})),
    *((key, NAN) for key in ("layer_norm_eps", "initializer_range", "hidden_dropout_prob")),
    *((key, value) for key in ("layer_norm_eps", "hidden_dropout_prob") for value in (-1.0, "0.1", 1e309, 10**400)),
    *(("dtype", value) for value in ("load", "__name__", "int8", "hub", 3)),
    *(("image_mean", value) for value in ([0.5], [0.5, 0.5, NAN], "abc", ["0"] * 3)),
    *(("image_std", value) for value in ([0.5], [0, 0, 0], [0.5, 0.5, -1])),
    ("num_attention_heads", 5, r"hidden_size: expected a multiple of num_attention_heads \(5\), got 32"),
    ("num_hidden_layers", 1000), ("encoder_stride", 10**6), ("pooler_output_size", 10**12), ("label2id", 3),
    ("hidden_act", "x" * 10**6), ("qkv_bias", "yes", "'qkv_bias' expected bool, got str"),
    # Keys that lead to other files, to code, or to the attributes of the config's class.
    ("transformers_weights", "../elsewhere.safetensors"),
    ("attn_implementation", "someone/kernel"), ("_attn_implementation", "someone/kernel"),
    ("_attn_implementation_internal", "someone/kernel"),
    ("per_layer_config", {"0": {"hidden_size": 64}}), ("fusion_config", {"patch_embeddings": True}),
    ("quantization_config", {"quant_method": "someone's"}, "quantization_config: expected .*, got \"someone's\""),
    ("quantization_config", 3),
    *((key, 3, f"'{key}': expected a setting of a ViT") for key in ("to_dict", "attribute_map", "__class__")),
]  # fmt: skip


def name_case(value: object) -> str:
    return escape_unprintable(format_value(value))[:40]


@pytest.mark.parametrize("case", BAD_CONFIGS, ids=name_case)
def test_a_value_of_config_json_out_of_bounds_is_refused(case, model):
    key, value, *pattern = case
    hostile.change_json(model / "config.json", **({"id2label": None} if key == "num_labels" else {}), **{key: value})
    with pytest.raises(InputError) as refused:
        load(model)
    message = str(refused.value)
    assert re.search(pattern[0] if pattern else rf"{key}: expected .*got {re.escape(format_value(value))}", message)
    assert len(message) < 600


NO_JSON_OBJECTS = {
    "empty": "", "open": "{", "list": "[]", "null": "null", "number": "3", "nested": '{"a":' * 50_000,
    "nested lists": "[" * 10**6, "digits": '{"hidden_size":' + "9" * 10_000 + "}", "not text": "\ud800",
}  # fmt: skip


@pytest.mark.parametrize("text", NO_JSON_OBJECTS.values(), ids=NO_JSON_OBJECTS)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_file_without_a_json_object_is_refused(name, text, model):
    (model / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (load_with_preprocessor, partial(convert, dest="converted")):
        with pytest.raises(InputError, match=rf"{name}: expected a JSON"):
            read(model)


def test_a_json_file_larger_than_memory_is_refused(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**34)  # a sparse file
    with pytest.raises(InputError, match="expected a JSON file of at most 104,857,600 bytes, found 17,179,869,184"):
        read_json(tmp_path / "config.json")


def test_a_config_is_checked_against_the_weights_before_memory_is_allocated(model):
    """Sizes within bounds that are not those of this checkpoint: 2 layers of 3 x 10**9 weights."""
    hostile.change_json(model / "config.json", hidden_size=2**14, intermediate_size=2**16, num_hidden_layers=2)
    (report,) = hostile.run_limited([partial(load_for_finetuning, model)], SMALL_MEMORY)
    assert "expected shape [16384, 3, 8, 8], as config.json describes it, found [32, 3, 8, 8]" in report
    # The same for weights of unknown names.
    tensors = load_file(model / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    (report,) = hostile.run_limited([partial(load_for_finetuning, model)], SMALL_MEMORY)
    assert "config.json describes a model of 6,446,170,112 weights, its files hold 23,619" in report


def test_the_caller_may_override_the_config_but_not_leave_out_layers(model):
    override = partial(ViTForImageClassification.from_pretrained, model)
    assert override(image_size=32).vit.embeddings.position_embeddings.shape == (1, 17, 32)
    assert override(num_labels=7, ignore_mismatched_sizes=True).classifier.out_features == 7
    assert override(config=ViTConfig(**hostile.CONFIG, hidden_act="relu")).config.hidden_act == "relu"
    with pytest.raises(InputError, match="unexpected keys"):
        override(num_hidden_layers=1)


def test_renamed_weights_are_checked_too(model):
    tensors = load_file(model / "model.safetensors")
    renamed = {name.replace("vit.", "mine."): tensor for name, tensor in tensors.items()}
    save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
    stored, names = read_config(model), {r"^mine\.": "vit."}
    check_checkpoint(model, stored, names)
    with pytest.raises(InputError, match="num_hidden_layers: expected 2, as its weights have, got 3"):
        check_checkpoint(model, {**stored, "num_hidden_layers": 3}, names)


# --- weights ---------------------------------------------------------------------------------------------------------


def rewrite_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))


def change_token(folder: Path, **values) -> None:
    rewrite_weights(folder, partial(hostile.edit_header, edit=lambda header: header[hostile.TOKEN].update(values)))


def change_header_length(folder: Path, length: int) -> None:
    rewrite_weights(folder, lambda data: struct.pack("<Q", length) + data[8:])


def save_raw(obj: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(obj))


def add_code(folder: Path, save=torch.save) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save({**tensors, "more": hostile.RunsCode()}, folder / "pytorch_model.bin")


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def claim_more(folder: Path, claim) -> None:
    """Replaces every tensor of the feed-forwards by `claim(shape)`, a tensor of 2**18 features without the memory."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    hostile.change_json(folder / "config.json", intermediate_size=2**18)
    for name, tensor in tensors.items():
        if 64 in tensor.shape:
            tensors[name] = claim([2**18 if side == 64 else side for side in tensor.shape])
    torch.save(tensors, folder / "pytorch_model.bin")


UNREADABLE = r"model\.safetensors: not a readable file of tensors"
CODE = r"pytorch_model\.bin: expected only tensors"
INDEX = r"model\.safetensors\.index\.json: expected .*, got "
CLAIM = r"pytorch_model\.bin: tensor .*: expected values that the file holds, found a view"
UNREADABLE_TOKENS = [
    {"data_offsets": [0, 128]}, {"data_offsets": [10**9, 10**9 + 128]}, {"data_offsets": [128, 0]},
    {"shape": [1, 1, 10**12]}, {"shape": [2**40, 2**40]}, {"shape": [-1, 1, 32]}, {"shape": "wide"},
    {"dtype": "F64"}, {"dtype": "F7"},
]  # fmt: skip
LENGTHS = (0, 1, 99 * 10**6, 2**40, 2**63, 2**64 - 1)
WEIGHT_FAULTS = {
    **{f"header with {values}": (partial(change_token, **values), UNREADABLE) for values in UNREADABLE_TOKENS},
    **{f"header of {length} bytes": (partial(change_header_length, length=length), UNREADABLE) for length in LENGTHS},
    "another shape": (partial(change_token, shape=[1, 32, 1]), r"cls_token: expected shape .* found \[1, 32, 1\]"),
    "integers": (partial(change_token, dtype="I32"), r"cls_token: expected floating point weights, found .*(I|int)32"),
    "code in pytorch_model.bin": (add_code, CODE),
    "code in a raw pickle": (partial(add_code, save=save_raw), CODE),
    "index of a parent's file": (partial(write_index, weight_map={"a": "../elsewhere.safetensors"}), INDEX),
    "index of an absolute path": (partial(write_index, weight_map={"a": "/elsewhere.safetensors"}), INDEX),
    "index of a number": (partial(write_index, weight_map={"a": 3}), INDEX),
    "index without files": (partial(write_index, weight_map=3), INDEX),
    "expanded tensor": (partial(claim_more, claim=torch.zeros(1).expand), CLAIM),
    "tensor without values": (partial(claim_more, claim=partial(torch.empty, device="meta")), CLAIM),
    "sparse tensor": (partial(claim_more, claim=partial(torch.zeros, layout=torch.sparse_coo)), CLAIM),
}


@pytest.mark.parametrize("kind", WEIGHT_FAULTS)
def test_bad_weights_are_refused_by_every_reader_in_little_memory(kind, model, tmp_path):
    damage, message = WEIGHT_FAULTS[kind]
    damage(model)
    for report in hostile.run_limited([partial(read, model) for read in READERS], SMALL_MEMORY):
        assert re.match(f"refused: .*{message}", report), report
    assert not Path("ran").exists() and not Path("converted").exists()


@pytest.mark.parametrize("save", [torch.save, save_raw])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_code_in_a_lone_torch_file_is_not_run(suffix, save):
    save({"a": torch.zeros(2), "more": hostile.RunsCode()}, Path(f"alone{suffix}"))
    with pytest.raises(InputError, match=rf"alone{suffix}: expected only tensors"):
        convert(f"alone{suffix}", "converted")
    assert not Path("ran").exists() and not Path("converted").exists()


def test_an_npz_with_objects_or_of_extreme_compression_is_refused():
    np.savez("a.npz", cls=np.array([hostile.RunsCode()], dtype=object))
    with pytest.raises(InputError, match=r"a\.npz: not a readable \.npz file of plain arrays"):
        convert("a.npz", "converted")
    assert not Path("ran").exists()
    np.savez_compressed("a.npz", cls=np.zeros((1, 1, 100 * 2**18), np.float32))
    with pytest.raises(InputError, match=r"a\.npz: expected weights, found [\d,]+ bytes that expand to 104,857,728"):
        convert("a.npz", "converted")


# --- image settings and remote code ----------------------------------------------------------------------------------

GIGANTIC = {"height": 10**9, "width": 10**9}
BAD_PREPROCESSORS = [
    *(("size", value, "size: expected a whole number")
      for value in (10**9, GIGANTIC, {"height": -1, "width": 16}, {"height": NAN, "width": 16})),
    *(("size", value, "invalid settings of an image processor") for value in ("big", [16], 0.5)),
    ("size", {"height": 32, "width": 32}, r"image processor: expected \w+ of \(16, 16\) .*, got \(32, 32\)"),
    *(("image_mean", value) for value in ([0.5], [NAN] * 3, "abc", None, ["0"] * 3)),
    *(("image_std", value) for value in ([0, 0, 0], [-1, 1, 1], [1e999] * 3, [0.5])),
    *(("resample", value) for value in (99, -1, "bilinear", NAN)),
    *(("rescale_factor", value) for value in (0, NAN, "x", 1e300, None)),
    ("do_resize", False, r"size: expected .*, got size None"),
    ("do_center_crop", True, r"crop_size: expected .*, got 1000000000"),
    ("do_pad", True, "do_pad: expected false, got True"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_PREPROCESSORS, ids=name_case)
def test_bad_image_settings_are_refused(case, model):
    key, value, *pattern = case
    more = {"do_center_crop": {"crop_size": GIGANTIC}, "do_pad": {"pad_size": GIGANTIC}}.get(key, {})
    hostile.change_json(model / "preprocessor_config.json", **{key: value}, **more)
    given = re.escape(format_value(tuple(value) if isinstance(value, list) else value))
    with pytest.raises(InputError, match=pattern[0] if pattern else rf"{key}: expected .*, got {given}") as refused:
        load_with_preprocessor(model)
    assert re.search(r"preprocessor_config\.json: |^image processor: ", str(refused.value))


def test_unknown_image_settings_have_no_effect(model):
    hostile.change_json(model / "preprocessor_config.json", preprocess=3, device="cuda", data_format="channels_last")
    pixels = load_with_preprocessor(model)(Image.new("RGB", (9, 9), "white"))
    assert pixels.shape == (16, 16, 3) and (pixels == 255).all()


def test_remote_code_is_never_run(model, capsys):
    classes = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForImageClassification")}
    hostile.change_json(model / "config.json", auto_map=classes, architectures=["Evil"])
    processor = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "processor_class": "Evil"}
    hostile.change_json(model / "preprocessor_config.json", **processor)
    leaves.draw_leaf("healthy", seed=1, size=24).save("leaf.png")
    for options in ({}, {"trust_remote_code": True}):
        assert type(ViTForImageClassification.from_pretrained(model, **options)) is ViTForImageClassification
    assert cli.main(["predict", str(model), "leaf.png", "--device", "cpu"]) == 0
    assert cli.main(["convert", str(model), "converted"]) == 0
    hostile.change_json(model / "preprocessor_config.json", image_processor_type="Evil")
    assert cli.main(["predict", str(model), "leaf.png", "--device", "cpu"]) == 2
    assert "image_processor_type: expected one for ViT, " in capsys.readouterr().err
    assert not Path("ran").exists()


# --- every command ---------------------------------------------------------------------------------------------------

FAULTS = {
    "layers": lambda folder: hostile.change_json(folder / "config.json", num_hidden_layers=10**6),
    "code": add_code,
    "header": partial(change_header_length, length=2**60),
    "json": lambda folder: (folder / "config.json").write_text("[" * 10**5),
}
IMAGE, FOLDER = str(Path("images", "healthy", "0.png")), ["--data-dir", "images"]
COMMANDS = {
    "predict": ["model", IMAGE, "--device", "cpu"],
    "attention": ["model", IMAGE, "-o", "out", "--device", "cpu"],
    "evaluate": ["model", *FOLDER, "--device", "cpu"],
    "convert": ["model", "out"],
    "finetune": ["--model", "./model", *FOLDER, "--output-dir", "out", *hostile.SHORT],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_refuses_a_bad_checkpoint_and_writes_nothing(command, fault, model, tmp_path, capsys):
    FAULTS[fault](model)
    hostile.make_image_folder(tmp_path / "images", per_class=2)
    assert cli.main([command, *COMMANDS[command]]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "images"}
