"""Streamed images: each occurs once per pass, a resumed run continues with the same images, and errors are clear."""

import io
import re
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shards import encode_leaf, make_shards, write_shard

from fastvit.data import leaves
from fastvit.data.datasets import load_images
from fastvit.data.images import Augment, decode_image
from fastvit.data.streaming import Stream, stream_images
from fastvit.errors import InputError
from fastvit.train.finetune import main
from fastvit.train.training import Progress

pytestmark = pytest.mark.usefixtures("own_folder")

SMALL = ["--from-scratch", "micro", "--image-size", "16", "--patch-size", "8", "--precision", "fp32", "--cpu"]
RUN = [*SMALL, "--streaming", "--batch-size", "4", "--max-steps", "8", "--eval-steps", "2", "--output-dir", "out"]


def open_shards(root, **kwargs):
    return stream_images(data_dir=root, class_names=",".join(leaves.CLASSES), **kwargs)


def stream(images, **kwargs):
    return Stream(images, (18, 18), Augment((16, 16)), seed=3, shuffle_buffer=5, **kwargs)


def take(stream, count, workers=0):
    """Labels and pixel bytes of the first `count` images of a loader with batches of 4."""
    loader = torch.utils.data.DataLoader(stream, batch_size=4, num_workers=workers)
    seen = []
    for batch in loader:
        images = [pixels.numpy().tobytes() for pixels in batch["pixel_values"]]
        seen += zip(batch["labels"].tolist(), images, strict=True)
        if len(seen) >= count:
            return seen[:count]
    raise AssertionError("the stream has ended")


def names(stream, count):
    iterator = stream.iterate_rows()
    return [next(iterator)[stream.images.image_column]["path"] for _ in range(count)]


@pytest.mark.parametrize(("shards", "world_size"), [(2, 1), (2, 2), (4, 2), (3, 2), (1, 2)])
def test_every_image_occurs_once_per_pass_for_any_number_of_shards_and_processes(shards, world_size, tmp_path):
    images = open_shards(make_shards(tmp_path / "shards", shards, per_shard=12 // shards))
    first, second = Counter(), Counter()
    for rank in range(world_size):
        own = names(stream(images, rank=rank, world_size=world_size), 24 // world_size)
        first.update(own[: 12 // world_size])
        second.update(own[12 // world_size :])
        assert own[: 12 // world_size] != own[12 // world_size :]  # another order in each pass
    assert first == second == Counter({f"{number:04}.png": 1 for number in range(12)})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_resumed_stream_continues_with_the_same_images_and_crops(workers, skip_bad, tmp_path):
    root = make_shards(tmp_path / "shards", shards=2, per_shard=9)
    if skip_bad:
        write_shard(root / "train-2.tar", [("bad", b"not an image", b"0"), ("good", encode_leaf(1, 99), b"1")])
    images = open_shards(root)
    whole = take(stream(images, skip_bad=skip_bad), 80, workers)
    assert take(stream(images, skip_bad=skip_bad), 80, workers) == whole
    for batches in (1, 2, 9):  # 9 batches: in the second pass
        resumed = stream(images, skip_bad=skip_bad)
        resumed.resume_after(batches, 4)
        assert take(resumed, 80, workers)[4 * batches :] == whole[4 * batches :]


def test_skipped_images_of_a_resumed_stream_are_not_decoded(tmp_path, monkeypatch):
    decoded = []
    decode = "fastvit.data.streaming.decode_image"

    def record(data, name, channels):
        decoded.append(name)
        return Image.open(io.BytesIO(data)).convert("RGB")

    monkeypatch.setattr(decode, record)
    images = open_shards(make_shards(tmp_path / "shards"))
    resumed = stream(images)
    resumed.resume_after(3, 4)
    placeholders = take(resumed, 13)[:12]
    assert {label for label, _ in placeholders} == {-1} and len(decoded) == 4


def test_crops_do_not_depend_on_other_random_numbers(tmp_path):
    images = open_shards(make_shards(tmp_path / "shards"))
    torch.manual_seed(1)
    one = take(stream(images), 8)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    torch.rand(7)
    assert take(stream(images), 8) == one
    torch.manual_seed(1)
    next(iter(stream(images)))
    torch.manual_seed(1)
    untouched = torch.get_rng_state()
    next(iter(stream(images)))
    assert torch.equal(torch.get_rng_state(), untouched) and state is not None


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch):
    make_shards(tmp_path / "shards", shards=2, per_shard=9)  # 18 images: 8 steps are almost two passes
    argv = ["--data-dir", "shards", *RUN, "--hidden-dropout", "0.1", "--keep-checkpoints", "9"]
    assert main(argv) == 0
    whole = load_file("out/checkpoint-8/model.safetensors")
    usual = Progress.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        usual(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_end", interrupt)
        assert main([*argv, "--output-dir", "again"]) == 130
    assert main([*argv, "--output-dir", "again", "--resume"]) == 0
    again = load_file("again/checkpoint-8/model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_class_names_default_to_the_values_of_the_labels(tmp_path, capsys):
    make_shards(tmp_path / "shards")
    assert main(["--data-dir", "shards", *RUN, "--max-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "--class-names makes that unnecessary" in printed
    assert re.search(r"9 \w+, 3 classes", printed) and "on streamed " in printed


@pytest.mark.parametrize("source", ["shards", "shards/train-*.tar"])
def test_shards_are_read_without_streaming(source, tmp_path):
    make_shards(tmp_path / "shards")
    images = load_images(data_dir=source, validation_fraction=0)
    streamed, train = stream_images(data_dir=source, need_validation=False), images.splits["train"]
    assert ("validation" in images.splits) == (source == "shards")
    expected = [(row["cls"], decode_image(row["png"]["bytes"])) for row in streamed.train]
    assert [images.class_names[label] for label in train.labels] == [str(label) for label, _ in expected]
    assert all(train.load(index) == image for index, (_, image) in enumerate(expected))


def test_labels_may_be_strings_in_a_column_of_any_name(tmp_path):
    words = [(f"{number}", encode_leaf(number % 3, number), leaves.CLASSES[number % 3].encode()) for number in range(6)]
    write_shard(tmp_path / "words" / "train.tar", words, extension="txt")
    images = stream_images(data_dir=tmp_path / "words", label_column="txt", need_validation=False)
    assert images.class_names == sorted(leaves.CLASSES)
    (tmp_path / "names.txt").write_text("healthy\nbean_rust\n\nangular_leaf_spot\n")
    named = stream_images(data_dir="words/*.tar", label_column="txt", class_names="names.txt", need_validation=False)
    assert named.class_names == ["healthy", "bean_rust", "angular_leaf_spot"]
    row = next(iter(named.train))
    assert named.class_names[named.get_label(row, "")] == row["txt"]


@pytest.fixture
def repository(tmp_path):
    """A dataset as on the hub: Parquet files, with a card that records the number of images."""
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.ClassLabel(names=list(leaves.CLASSES))})
    for split, count in (("train", 20), ("validation", 5)):
        rows = {
            "image": [{"bytes": encode_leaf(number % 3, number), "path": None} for number in range(count)],
            "labels": [number % 3 for number in range(count)],
        }
        (tmp_path / "repository" / "data").mkdir(parents=True, exist_ok=True)
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(tmp_path / "repository" / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "repository" / "README.md").write_text(
        "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 20\n"
        "  - name: validation\n    num_examples: 5\n---\n"
    )
    return "./repository"


def test_a_dataset_of_known_size_can_be_trained_for_epochs(repository, tmp_path, monkeypatch):
    # `datasets` waits for 5 s if a Parquet file is not read to its end.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    images = stream_images(repository, need_length=True, max_eval_samples=4)
    assert (
        images.num_train == 20 and images.class_names == list(leaves.CLASSES) and len(images.splits["validation"]) == 4
    )
    argv = ["--dataset", repository, *SMALL, "--streaming", "--batch-size", "4", "--epochs", "1.5", "--eval-steps", "8"]
    assert main([*argv, "--output-dir", "out"]) == 0
    assert (tmp_path / "out" / "checkpoint-8").exists()  # 1.5 x 20 / 4, rounded up


def test_a_folder_of_images_can_be_streamed(tmp_path):
    for split in ("train", "validation"):
        for label, name in enumerate(leaves.CLASSES):
            (tmp_path / "folder" / split / name).mkdir(parents=True)
            (tmp_path / "folder" / split / name / "0.png").write_bytes(encode_leaf(label, label))
    images = stream_images(data_dir=tmp_path / "folder")
    assert images.class_names == list(leaves.CLASSES) and images.splits["validation"].labels.tolist() == [0, 1, 2]
    labels = Counter(label for label, _ in take(stream(images), 12))
    assert labels == {0: 4, 1: 4, 2: 4}
    np.testing.assert_array_equal(images.splits["validation"].load(1), Image.open(io.BytesIO(encode_leaf(1, 1))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--max-steps", "-1"],
            "--max-steps: expected with --streaming, because shards does not record how many images",
        ),
        (
            ["--data-dir", "shards/train*.tar"],
            "expected a split called 'validation', found train; a stream cannot be split",
        ),
        (["--data-dir", "shards/none*.tar"], "data_dir: expected a folder, or a pattern of .tar files, got"),
        (["--max-train-samples", "9"], "--max-train-samples: cannot be used with --streaming"),
        (["--class-names", "a,b,a"], "--class-names: expected each class once, got a twice"),
        (["--class-names", "only"], "expected at least 2 classes, found 1: only"),
        (["--class-names", "a,b"], "expected one of 2 classes, found 2"),
        (["--shuffle-buffer", "0"], "--shuffle-buffer: expected at least 1, got 0"),
        (["--label-column", "colour"], "label_column: expected one of png, cls, __key__, __url__, got 'colour'"),
        (["--fsdp"], "--fsdp: expected several processes; start them with torchrun"),
    ],
)
def test_wrong_options_are_refused_with_one_line_and_nothing_is_written(options, message, tmp_path, capsys):
    make_shards(tmp_path / "shards")
    assert main(["--data-dir", "shards", *RUN, *options]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line, line
    assert not (tmp_path / "out").exists()


def test_options_of_streams_are_refused_without_streaming(capsys):
    assert main(["--dataset", "generated", "--streaming"]) == 2
    assert main(["--class-names", "a,b"]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("error: --streaming: expected a hub dataset or --data-dir")
    assert second.startswith("error: --class-names: expected together with --streaming")


@pytest.mark.parametrize("kind", ["no image", "truncated archive"])
def test_an_unreadable_image_or_archive_of_a_stream_is_named(kind, tmp_path):
    root = make_shards(tmp_path / "shards")
    images = open_shards(root)
    if kind == "no image":
        write_shard(root / "train-1.tar", [("bad", b"not an image", b"0")])
        message = "bad.png: expected an image, found a file in none of these formats"
    else:
        shard = root / "train-1.tar"
        shard.write_bytes(shard.read_bytes()[:700])
        message = "shards: cannot be read further"
    with pytest.raises(InputError, match=message):
        take(stream(images), 100)
