"""Checkpoints that are broken or malicious: refused with one clear message, without running code."""

from __future__ import annotations

import json
import math
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

pytestmark = hostile.MARKS

NAN = math.nan
SMALL_MEMORY = 300 * 2**20


@pytest.fixture
def model(tmp_path) -> Path:
    return hostile.write_files(tmp_path / "model", hostile.build_checkpoint())


def load_for_finetuning(folder: Path) -> None:
    load_pretrained(str(folder), ignore_mismatched_sizes=True)  # transformers then ignores other shapes


READERS = (hostile.load, load_for_finetuning, partial(convert, dest="converted"))

SIZES = [key for key in hostile.CONFIG if key in SIZE_LIMITS and key != "num_labels"]
GIGANTIC = {"height": 10**9, "width": 10**9}
# Keys, values, and the message where it is not the key, what was expected and the value.
BAD_CONFIGS = [
    (SIZES, [10**9, 10**4000, 0, -32, "32", NAN, True, 32.0, None, [], {}]),
    (["image_size"], [[16, 16, 16], ["16", "16"], [16, -16], [10**9, 1]]),
    (["image_size"], [4], r"image_size: expected room for one patch of \(8, 8\), got \(4, 4\)"),
    (["num_labels"], [10**9, -1, "3", 1.5]),
    (["id2label"], [["a"], "abc"]),
    (["id2label"], [{"a": "b"}, {"0": {}}, {"9" * 5000: "a"}], "id2label: expected numbers and names, got '"),
    (["layer_norm_eps", "hidden_dropout_prob"], [NAN, -1.0, "0.1", 1e309, 10**400]),
    (["initializer_range"], [NAN]),
    (["dtype"], ["load", "__name__", "int8", "hub", 3]),
    (["image_mean"], [[0.5], [0.5, 0.5, NAN], "abc", ["0"] * 3]),
    (["image_std"], [[0.5], [0, 0, 0], [0.5, 0.5, -1]]),
    (["num_attention_heads"], [5], r"hidden_size: expected a multiple of num_attention_heads \(5\), got 32"),
    (["num_hidden_layers"], [1000]), (["encoder_stride"], [10**6]), (["pooler_output_size"], [10**12]),
    (["label2id"], [3]), (["hidden_act"], ["x" * 10**6]),
    (["qkv_bias"], ["yes"], "'qkv_bias' expected bool, got str"),
    # Keys that lead to other files, to code, or to the attributes of the config's class.
    (["transformers_weights"], ["../elsewhere.safetensors"]),
    (["attn_implementation", "_attn_implementation", "_attn_implementation_internal"], ["someone/kernel"]),
    (["per_layer_config"], [{"0": {"hidden_size": 64}}]), (["fusion_config"], [{"patch_embeddings": True}]),
    (["quantization_config"], [3]),
    (["quantization_config"], [{"quant_method": "someone's"}], "quantization_config: expected .*, got \"someone's\""),
    *(([key], [3], f"'{key}': expected a setting of a ViT") for key in ("to_dict", "attribute_map", "__class__")),
]  # fmt: skip
BAD_PREPROCESSORS = [
    (["size"], [10**9, GIGANTIC, {"height": -1, "width": 16}, {"height": NAN, "width": 16}],
     "size: expected a whole number"),
    (["size"], ["big", [16], 0.5], "invalid settings of an image processor"),
    (["size"], [{"height": 32, "width": 32}], r"image processor: expected \w+ of \(16, 16\) .*, got \(32, 32\)"),
    (["image_mean"], [[0.5], [NAN] * 3, "abc", None, ["0"] * 3]),
    (["image_std"], [[0, 0, 0], [-1, 1, 1], [1e999] * 3, [0.5]]),
    (["resample"], [99, -1, "bilinear", NAN]),
    (["rescale_factor"], [0, NAN, "x", 1e300, None]),
    (["do_resize"], [False], r"size: expected .*, got size None"),
    (["do_center_crop"], [True], r"crop_size: expected .*, got 1000000000"),
    (["do_pad"], [True], "do_pad: expected false, got True"),
]  # fmt: skip
BAD_SETTINGS = [
    (name, key, value, *message)
    for name, table in {"config.json": BAD_CONFIGS, "preprocessor_config.json": BAD_PREPROCESSORS}.items()
    for keys, values, *message in table
    for key in keys
    for value in values
]
OTHER_SETTINGS = {  # those that go with another
    "num_labels": {"id2label": None}, "do_center_crop": {"crop_size": GIGANTIC}, "do_pad": {"pad_size": GIGANTIC},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS, ids=lambda case: escape_unprintable(format_value(case))[:70])
def test_a_setting_out_of_bounds_is_refused(case, model):
    name, key, value, *pattern = case
    hostile.change_json(model / name, **{**OTHER_SETTINGS.get(key, {}), key: value})
    with pytest.raises(InputError) as refused:
        hostile.load(model)
    message = str(refused.value)
    if name == "preprocessor_config.json":
        assert re.search(r"preprocessor_config\.json: |^image processor: ", message)
        value = tuple(value) if isinstance(value, list) else value
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
    for read in (hostile.load, partial(convert, dest="converted")):
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


def change_token(folder: Path, values: dict) -> None:
    path, token = folder / "model.safetensors", hostile.TOKEN
    path.write_bytes(hostile.edit_header(path.read_bytes(), lambda header: header | {token: header[token] | values}))


def change_header_length(folder: Path, length: int) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", length))


def add_code(folder: Path, save) -> None:
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
WEIGHT_FAULTS = [  # what is done to the weights, with which values, the message
    (change_token, [{"data_offsets": [0, 128]}, {"data_offsets": [10**9, 10**9 + 128]}, {"data_offsets": [128, 0]},
                    {"shape": [1, 1, 10**12]}, {"shape": [2**40, 2**40]}, {"shape": [-1, 1, 32]}, {"shape": "wide"},
                    {"dtype": "F64"}, {"dtype": "F7"}], UNREADABLE),
    (change_header_length, [0, 1, 99 * 10**6, 2**40, 2**63, 2**64 - 1], UNREADABLE),
    (change_token, [{"shape": [1, 32, 1]}], r"cls_token: expected shape .* found \[1, 32, 1\]"),
    (change_token, [{"dtype": "I32"}], r"cls_token: expected floating point weights, found .*(I|int)32"),
    (add_code, [torch.save, hostile.save_pickle], r"pytorch_model\.bin: expected only tensors"),
    (write_index, [{"a": "../elsewhere.safetensors"}, {"a": "/elsewhere.safetensors"}, {"a": 3}, 3],
     r"model\.safetensors\.index\.json: expected .*, got "),
    (claim_more, [torch.zeros(1).expand, partial(torch.empty, device="meta"),
                  partial(torch.zeros, layout=torch.sparse_coo)],
     r"pytorch_model\.bin: tensor .*: expected values that the file holds, found a view"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "value", "message"),
    [(damage, value, message) for damage, values, message in WEIGHT_FAULTS for value in values],
)
def test_bad_weights_are_refused_by_every_reader_in_little_memory(damage, value, message, model):
    damage(model, value)
    for report in hostile.run_limited([partial(read, model) for read in READERS], SMALL_MEMORY):
        assert re.match(f"refused: .*{message}", report), report
    assert not Path("ran").exists() and not Path("converted").exists()


LONE_FILES = {
    **{f"{save.__name__}{suffix}": (partial(save, {"a": torch.zeros(2), "more": hostile.RunsCode()}),
                                    "expected only tensors")
       for suffix in (".bin", ".pt", ".pth") for save in (torch.save, hostile.save_pickle)},
    "objects.npz": (partial(np.savez, cls=np.array([hostile.RunsCode()], dtype=object)),
                    r"not a readable \.npz file of plain arrays"),
    "zeros.npz": (lambda name: np.savez_compressed(name, cls=np.zeros((1, 1, 100 * 2**18), np.float32)),
                  r"expected weights, found [\d,]+ bytes that expand to 104,857,728"),
}  # fmt: skip


@pytest.mark.parametrize("name", LONE_FILES)
def test_a_bad_lone_file_of_weights_is_refused(name):
    save, message = LONE_FILES[name]
    save(name)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        convert(name, "converted")
    assert not Path("ran").exists() and not Path("converted").exists()


def test_unknown_image_settings_have_no_effect(model):
    hostile.change_json(model / "preprocessor_config.json", preprocess=3, device="cuda", data_format="channels_last")
    pixels = hostile.load(model)[1](Image.new("RGB", (9, 9), "white"))
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


FAULTS = {
    "layers": lambda folder: hostile.change_json(folder / "config.json", num_hidden_layers=10**6),
    "code": partial(add_code, save=torch.save),
    "header": partial(change_header_length, length=2**60),
    "json": lambda folder: (folder / "config.json").write_text("[" * 10**5),
}
COMMANDS = [
    "predict model images/healthy/0.png --device cpu",
    "attention model images/healthy/0.png -o out --device cpu",
    "evaluate model --data-dir images --device cpu",
    "convert model out",
    f"finetune --model ./model --data-dir images --output-dir out {' '.join(hostile.SHORT)}",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_refuses_a_bad_checkpoint_and_writes_nothing(command, fault, model, tmp_path, capsys):
    FAULTS[fault](model)
    hostile.make_image_folder(tmp_path / "images", per_class=2)
    assert cli.main(command.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "images"}
