"""The options of `fastvit finetune`: one definition for the command line, its help, YAML files and `config.yaml`."""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import fastvit
from fastvit import cli
from fastvit.cli import sweep as sweep_command
from fastvit.data import leaves
from fastvit.errors import InputError
from fastvit.train import sweep
from fastvit.train.arguments import HelpFormatter, add_arguments, get_flag
from fastvit.train.finetune import main
from fastvit.train.options import (
    DEFAULT_MODEL,
    GENERATED_DEFAULTS,
    GROUPS,
    FinetuneOptions,
    build_parser,
    parse_options,
)
from fastvit.train.run_folder import select_run_options

FIELDS = {field.name: field for field in dataclasses.fields(FinetuneOptions)}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write_config(**values) -> list[str]:
    """The options that read a file with `values`."""
    Path("options.yaml").write_text(yaml.safe_dump(values))
    return ["--config", "options.yaml"]


def read_error(capsys) -> str:
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Defaults and precedence
# ---------------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_beans_recipe():  # with those of the plain recipe in test_defaults.py
    options = parse_options([])
    assert (options.dataset, options.model) == ("beans", DEFAULT_MODEL)
    assert (options.batch_size, options.eval_steps, options.precision) == (16, 100, "auto")
    assert options == FinetuneOptions() and options.output_dir == str(Path("runs/beans"))


def test_recipes_are_off_by_default():
    options = parse_options([])
    assert (options.randaugment, options.ema, options.class_balanced, options.lora) == (None,) * 4
    assert (options.mixup, options.cutmix, options.drop_path) == (0, 0, 0)
    assert (options.early_stopping, options.folds, options.flip, options.calibrate) == (None, None, False, False)


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        (["--data-dir", "some/images"], "runs/images"),
        (["--data-dir", "some/shards/part-*.tar"], "runs/shards"),
        (["--dataset", "me/flowers"], "runs/flowers"),
        (["--output-dir", "here"], "here"),
    ],
)
def test_output_folder_is_named_after_the_dataset(options, folder):
    assert parse_options(options).output_dir == str(Path(folder))


def test_generated_leaves_have_other_defaults():
    options = parse_options(["--dataset", "generated"])
    assert {name: getattr(options, name) for name in GENERATED_DEFAULTS} == GENERATED_DEFAULTS
    assert parse_options(["--dataset", "generated", "--learning-rate", "5e-4"]).learning_rate == 5e-4
    assert parse_options(["--dataset", "generated", "--model", DEFAULT_MODEL]).from_scratch is None
    from_file = parse_options(write_config(dataset="generated", epochs=2))
    assert (from_file.epochs, from_file.batch_size) == (2, 32)


def test_command_line_takes_precedence_over_a_file():
    Path("options.yaml").write_text(
        "epochs: 7\nlearning-rate: 5.0e-5\naugment: false\ndata-dir: somewhere\nwarmup: 3\n"
    )
    options = parse_options(["--config", "options.yaml", "--epochs", "2", "--warmup", "0"])
    assert (options.epochs, options.learning_rate, options.augment, options.data_dir) == (2, 5e-5, False, "somewhere")
    assert options.warmup == 0  # the default, but given


# ---------------------------------------------------------------------------------------------------------------------
# Command line and file
# ---------------------------------------------------------------------------------------------------------------------

VALUES = {
    "from_scratch": "tiny", "image_size": 32, "freeze_backbone": True, "hidden_dropout": 0.5,
    "data_dir": "images", "class_balanced": 0.9, "randaugment": [2, 9], "augment": False, "tune": False,
    "precision": "bf16", "epochs": 0.5, "max_steps": -1, "learning_rate": 1e-5, "report_to": "wandb", "ema": 0.9,
    "early_stopping": 3, "output_dir": "out", "push_to_hub": "me/it", "resume": True, "seed": 0,
}  # fmt: skip


def test_file_and_command_line_mean_the_same():
    argv = []
    for name, value in VALUES.items():
        if isinstance(value, bool):
            argv.append(get_flag(name) if value else get_flag(f"no_{name}"))
        else:
            argv += [get_flag(name), *map(str, value if isinstance(value, list) else [value])]
    options = parse_options(argv)
    assert {name: getattr(options, name) for name in VALUES} == VALUES
    assert options == parse_options(write_config(**VALUES))
    assert options == parse_options(write_config(**{name.replace("_", "-"): value for name, value in VALUES.items()}))


def test_config_file_of_a_run_holds_every_option():
    options = parse_options(write_config(**VALUES))
    stored = select_run_options(options)
    unset = FIELDS.keys() - stored.keys() - {"overwrite", "resume", "model"}  # from scratch, it is of no use
    assert all(getattr(options, name) is None for name in unset)
    assert select_run_options(parse_options(write_config(**stored))) == stored


@pytest.mark.parametrize("from_file", ["", "model", "from_scratch", "both"])
@pytest.mark.parametrize("dataset", ["generated", "beans"])
def test_from_scratch_and_a_model_are_refused_together(from_file, dataset):
    both = {"model": "me/vit", "from_scratch": "tiny"}
    in_file = {name: value for name, value in both.items() if from_file in (name, "both")}
    given = [text for name in both.keys() - in_file.keys() for text in (get_flag(name), both[name])]
    with pytest.raises(InputError, match=r"--from-scratch: give --from-scratch tiny .* or --model me/vit"):
        parse_options([*write_config(dataset=dataset, **in_file), *given])


def test_from_scratch_and_the_default_model_are_refused_where_both_are_given():
    with pytest.raises(InputError, match=f"--from-scratch tiny .* or --model {DEFAULT_MODEL}"):
        parse_options(["--from-scratch", "tiny", "--model", DEFAULT_MODEL])
    # Files of earlier versions have the default beside the size.
    assert parse_options(write_config(from_scratch="tiny", model=DEFAULT_MODEL)).from_scratch == "tiny"


def test_options_of_a_run_from_scratch_name_no_model():
    assert "model" not in select_run_options(parse_options(["--from-scratch", "tiny"]))
    assert select_run_options(parse_options(["--model", "me/vit"]))["model"] == "me/vit"


def test_texts_in_a_file_are_read_as_on_the_command_line():
    # YAML 1.1 reads 1e-3 as a text, since it has no point.
    Path("options.yaml").write_text("learning_rate: 1e-3\nimage_size: '32'\ndataset: 7\nepochs: 3\nseed: null\n")
    options = parse_options(["--config", "options.yaml"])
    assert (options.learning_rate, options.image_size, options.dataset, options.seed) == (1e-3, 32, "7", 42)
    assert options.epochs == 3.0 and isinstance(options.epochs, float)


def test_class_balanced_without_a_value():
    assert parse_options(["--class-balanced", "--cpu"]).class_balanced == 0.999
    assert parse_options(["--class-balanced", "0.5"]).class_balanced == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "options.yaml: unknown option 'epoch'; the closest is 'epochs'"),
        ("learn-rate: 3", "options.yaml: unknown option 'learn-rate'; the closest is 'learning-rate'"),
        ("3: 4", "options.yaml: unknown option '3'"),
        ("config: other.yaml", "options.yaml: unknown option 'config'"),
        ("epochs: many", "options.yaml: epochs: expected a number, got 'many'"),
        ("epochs: true", "options.yaml: epochs: expected a number, got True"),
        ("epochs: [1]", "options.yaml: epochs: expected a number, got [1]"),
        ("image_size: 32.5", "options.yaml: image_size: expected a whole number, got '32.5'"),
        ("augment: 3", "options.yaml: augment: expected true or false, got 3"),
        ("model: {a: b}", "options.yaml: model: expected text, got {'a': 'b'}"),
        ("precision: fp8", "options.yaml: precision: expected one of auto, fp32, bf16, fp16, got 'fp8'"),
        ("precision: true", "options.yaml: precision: expected one of auto, fp32, bf16, fp16, got 'True'"),
        ("randaugment: 3", "options.yaml: randaugment: expected a list of 2 values, got 3"),
        ("randaugment: [1, x]", "options.yaml: randaugment: expected a whole number, got 'x'"),
        ("[1, 2", "cannot read options.yaml"),
        ("epochs: 1\nepochs: 2", "options.yaml: expected each option once, got 'epochs' and 'epochs'"),
        ("batch-size: 4\nbatch_size: 5", "options.yaml: expected each option once, got 'batch-size' and 'batch_size'"),
        ("- 3", "expected 'option: value' lines in options.yaml, got a list"),
    ],
)
def test_wrong_option_files_are_one_clear_line(text, message, capsys):
    Path("options.yaml").write_text(text)
    assert main(["--config", "options.yaml"]) == 2
    assert read_error(capsys).startswith(f"error: --config: {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "many"], "argument --epochs: expected a number, got 'many'"),
        (["--batch-size", "1.5"], "argument --batch-size: expected a whole number, got '1.5'"),
        (["--precision", "fp8"], "argument --precision: expected one of auto, fp32, bf16, fp16, got 'fp8'"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_values_of_a_wrong_type_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2 and message in read_error(capsys)


WRONG_VALUES = {
    "--epochs: expected a number above 0, got nan": {"epochs": "nan"},
    "--batch-size: expected a number above 0, got 0": {"batch_size": 0},
    "--image-size: expected at least 1, got 0": {"image_size": 0},
    "--label-smoothing: expected 0 or more and below 1, got 1.5": {"label_smoothing": 1.5},
    "--layer-decay: expected above 0 and at most 1, got 0.0": {"layer_decay": 0},
    "--warmup: expected a number of at least 0, got -1.0": {"warmup": -1},
    "--scheduler: expected one of linear, cosine": {"scheduler": "steep"},
    "--keep-checkpoints: expected a number of at least 0, got -1": {"keep_checkpoints": -1},
    "--randaugment: expected N from 1 to 15 and M from 1 to 29, got [0, 9]": {"randaugment": [0, 9]},
    "--mixup: expected a number of at least 0, got -1.0": {"mixup": -1},
    "--drop-path: expected 0 or more and below 1, got 1.0": {"drop_path": 1},
    "--ema: expected a number between 0 and 1, got 1.0": {"ema": 1},
    "--class-balanced: expected a number from 0 to 1, got 2.0": {"class_balanced": 2},
    "--lora: expected a rank of at least 1, got 0": {"lora": 0},
    "--folds: expected at least 2 folds, got 1": {"folds": 1},
    "--fold: expected 1 to the number of --folds, got 2": {"fold": 2},
    "--fold: expected 1 to the number of --folds, got 3": {"fold": 3, "folds": 2},
    "--early-stopping: expected at least 1 evaluation, got 0": {"early_stopping": 0},
    "--data-dir: give a folder or a --dataset, not both": {"data_dir": "a", "dataset": "b"},
    "--resume: give --resume or --overwrite, not both": {"resume": True, "overwrite": True},
    "--folds: its models are for measuring; give --folds or --push-to-hub, not both": {"folds": 2, "push_to_hub": "a"},
    "--lora: expected a pretrained --model to adapt, got --from-scratch": {"lora": 2, "from_scratch": "tiny"},
    "--lora: give --lora or --freeze-backbone, not both": {"lora": 2, "freeze_backbone": True},
    "--fsdp: expected several processes": {"fsdp": True},
    "--mixup: cannot be used with --streaming": {"mixup": 1, "streaming": True},
    "--streaming: expected a hub dataset or --data-dir": {"streaming": True, "dataset": "generated"},
    "--max-train-samples: cannot be used with --streaming": {"streaming": True, "max_train_samples": 2},
    "--class-names: expected together with --streaming": {"class_names": "a,b"},
}


@pytest.mark.parametrize("message", WRONG_VALUES)
def test_wrong_values_are_one_clear_line_from_a_file_and_from_the_command_line(message, capsys):
    values = WRONG_VALUES[message]
    argv = []
    for name, value in values.items():
        given = value if isinstance(value, list) else [] if value is True else [value]
        argv += [get_flag(name), *map(str, given)]
    for options in (argv, write_config(**values)):
        assert main(options) == 2
        assert read_error(capsys).startswith(f"error: {message}")
    assert not Path("runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------


def test_help_is_grouped_and_shows_real_defaults():
    text = build_parser().format_help()
    assert all(f"\n{heading}:\n" in text for heading in GROUPS)
    words = " ".join(text.split())
    assert (
        "images per step and device (default: 16)" in words and "random resized crop and flip (default: True)" in words
    )
    for name, value in GENERATED_DEFAULTS.items():
        assert f"{get_flag(name)} {value}" in words
    assert all(f" {get_flag(name)}" in text for name in FIELDS)


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "benchmark"])
def test_help_of_every_command_has_no_noise_and_does_not_import_pytorch(name):
    program = (
        "import sys; from fastvit import cli\n"
        f"try: cli.main([{name!r}, '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"usage: fastvit {name}" in done.stdout
    for noise in ("default: None", "default: False", "default: )", "default: ["):
        assert noise not in done.stdout


def test_defaults_of_lists_are_shown_as_they_are_given():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[1, 2], help="sizes")
    assert "sizes (default: 1 2)" in parser.format_help()
    add_arguments(parser, FinetuneOptions)
    assert parser.parse_args([]).batch_size == 16


@pytest.mark.parametrize(("name", "hint"), [("fintune", "did you mean 'finetune'?"), ("xyz", "got 'xyz'\n")])
def test_unknown_commands_are_one_clear_line(name, hint, capsys):
    assert cli.main([name]) == 2
    assert hint in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Sweep
# ---------------------------------------------------------------------------------------------------------------------


def test_sweep_accepts_the_options_of_finetune(monkeypatch):
    seen = {}

    def record(options, space, trials, folder):
        seen.update(vars(options), space=space, trials=trials)

    monkeypatch.setattr(sweep, "run", record)
    sweep_command.main(["--dataset", "generated", "--epochs", "3", "--trials", "5", "--search", "mixup"])
    assert (seen["epochs"], seen["from_scratch"], seen["trials"]) == (3, "micro", 5)
    assert seen["space"] == {"mixup": (0.0, 1.0, False)}
    sweep_command.main([*write_config(epochs=2), "--search", "weight-decay=0.01:0.1", "warmup"])
    assert seen["epochs"] == 2 and list(seen["space"]) == ["weight_decay", "warmup"]
    with pytest.raises(fastvit.InputError, match="--folds: cannot be used in a sweep"):
        sweep_command.main(["--folds", "3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "epochs"], "--search: expected one of learning-rate, "),
        (["--search", "mixup=1"], "--search: expected mixup=LOW:HIGH, two numbers"),
        (["--search", "mixup=1:0"], "--search: expected LOW:HIGH from low to high"),
        (["--search", "learning-rate=0:1"], "above 0"),
        (["--search", "drop-path=0:1"], "--drop-path: expected 0 or more and below 1, got 1.0"),
        (["--trials", "0"], "--trials: expected at least 1, got 0"),
    ],
)
def test_wrong_searches_are_one_clear_line(options, message, capsys):
    assert cli.main(["sweep", "--dataset", "generated", *options]) == 2
    assert message in read_error(capsys) and not Path("runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Runs of the version before
# ---------------------------------------------------------------------------------------------------------------------

# config.yaml as the argparse namespace wrote it, for a run of 2 steps.
BEFORE = """
model: google/vit-base-patch16-224-in21k
from_scratch: micro
image_size: 16
patch_size: 8
freeze_backbone: false
attention_dropout: 0.0
hidden_dropout: 0.0
data_dir: images
validation_fraction: 0.5
generated_images: 2000
streaming: false
shuffle_buffer: 1000
skip_bad_images: false
augment: true
workers: 0
epochs: 4.0
max_steps: 2
batch_size: 2
learning_rate: 0.0002
weight_decay: 0.0
warmup: 0.0
scheduler: linear
layer_decay: 1.0
label_smoothing: 0.0
gradient_accumulation: 1
auto_batch: false
gradient_checkpointing: false
precision: fp32
tune: true
compile: false
fsdp: false
cpu: true
seed: 42
mixup: 0.0
cutmix: 0.0
drop_path: 0.0
flip: false
calibrate: false
output_dir: out
eval_steps: 1
logging_steps: 1
keep_checkpoints: 2
report_to: none
"""


def test_run_of_the_version_before_is_resumed_and_repeated(capsys):
    for label in ("healthy", "bean_rust"):
        Path("images", label).mkdir(parents=True)
        for seed in range(3):
            leaves.draw_leaf(label, seed=seed, size=24).save(f"images/{label}/{seed}.png")
    Path("old.yaml").write_text(BEFORE)
    options = parse_options(["--config", "old.yaml"])
    # It named the default model beside --from-scratch, which has none.
    expected = {name: value for name, value in yaml.safe_load(BEFORE).items() if name != "model"} | {"channels": 3}
    assert select_run_options(options) == expected
    assert main(["--config", "old.yaml"]) == 0
    assert yaml.safe_load(Path("out/config.yaml").read_text()) == expected | {"recipe": "plain"}
    Path("out/config.yaml").write_text(BEFORE)
    capsys.readouterr()
    assert main(["--config", "out/config.yaml", "--max-steps", "3", "--resume"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert notes == ["note: max_steps is 3; the run had 2 before"]
    Path("out/config.yaml").write_text("[1, 2")
    assert main(["--config", "old.yaml", "--resume"]) == 2
    assert "--resume: out/config.yaml: expected the options of the run" in read_error(capsys)


def test_proposed_values_are_checked_too():
    options = FinetuneOptions()
    assert dataclasses.replace(options, mixup=0.5).mixup == 0.5
    with pytest.raises(fastvit.InputError, match=r"--mixup: expected a number of at least 0, got -1"):
        dataclasses.replace(options, mixup=-1)
    with pytest.raises(fastvit.InputError, match=r"--drop-path: .* got nan"):
        dataclasses.replace(options, drop_path=np.nan)
