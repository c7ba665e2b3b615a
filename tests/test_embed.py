"""`fastvit embed`: its features are those of transformers, in every kind of file, and so are neighbours of images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from backbones import CASES, build_backbone, save_checkpoint
from PIL import Image

from fastvit import cli
from fastvit.data import leaves
from fastvit.serve import embedding
from fastvit.serve.embedding import Embedder, find_neighbours, measure_neighbours
from fastvit.serve.preprocessing import load_preprocessor


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Drawn leaves and checkpoints of every family, none of them a classifier."""
    root = tmp_path_factory.mktemp("embed")
    for split, count in (("train", 3), ("validation", 2)):
        for label in leaves.CLASSES:
            (root / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                image = leaves.draw_leaf(label, seed=number + 10 * (split == "validation"), size=32)
                image.save(root / "images" / split / label / f"{number}.png")
    for name in CASES:
        save_checkpoint(name, root / name)
    return root


@pytest.fixture(autouse=True)
def _own_folder(own_folder, home, tmp_path):
    shutil.copytree(home / "images", tmp_path / "images")


def embed(home: Path, *arguments: str, name: str = "DINOv2") -> int:
    return cli.main(["embed", str(home / name), *arguments, "--device", "cpu"])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_are_those_of_transformers(name, home):
    case, images = CASES[name], [str(path) for path in sorted(Path("images").rglob("*.png"))[:3]]
    with Embedder(str(home / name), "cpu", None, None) as embedder:
        found, sizes = np.stack(embedder(images)), embedder.model.sizes
    assert sizes == {kind: 64 for kind in ("cls", "mean") if case.prefix or kind == "mean"} | {
        "pooled": 128 if case.pool == "cls+mean" else 64
    }
    preprocessor = load_preprocessor(str(home / name))
    pixels = torch.tensor(np.stack([preprocessor(Image.open(path).convert("RGB")) for path in images])) / 255
    pixels = (pixels - torch.tensor(preprocessor.mean)) / torch.tensor(preprocessor.std)
    backbone, options = build_backbone(name, images=3, patches=16)
    tokens = raw = backbone(pixels.permute(0, 3, 1, 2), **options).last_hidden_state
    if name.startswith("CLIP"):  # its classifier reads the mean before the final norm
        tokens = backbone.post_layernorm(raw)
    mean = tokens[:, case.prefix :].mean(1)
    expected = [tokens[:, 0], mean] if case.prefix else [mean]
    pooled = {"cls": tokens[:, 0], "mean": raw[:, case.prefix :].mean(1), "cls+mean": torch.cat(expected, -1)}
    pooled = pooled[case.pool]
    if name.startswith("BEiT"):  # the norm is in the pooler; a checkpoint of pre-training has none
        pooled = backbone.pooler.layernorm(mean) if backbone.pooler else F.layer_norm(mean, [64], eps=1e-12)
    np.testing.assert_allclose(found, torch.cat([*expected, pooled], -1), rtol=1e-3, atol=1e-4)


def read_features(path: str) -> np.ndarray:
    """The features of a file, one row for each image, the kinds beside each other."""
    if path.endswith(".csv"):
        return np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(3, 3 + 256), dtype=np.float32)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return np.array([row["cls"] + row["mean"] + row["pooled"] for row in rows], dtype=np.float32)


def test_files_hold_the_same_features_with_labels_and_continue(home, capsys, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(embedding.WRITERS, ".parquet", fail)
        assert embed(home, "--data-dir", "images", "--split", "train", "-o", "features.parquet") == 130
    capsys.readouterr()
    assert embed(home, "--data-dir", "images", "--split", "train", "-o", "features.parquet", "--pool", "cls") == 2
    assert "was started with pool None, now 'cls'" in capsys.readouterr().err
    assert embed(home, "--data-dir", "images", "--split", "train", "-o", "features.parquet") == 0
    printed = capsys.readouterr()
    assert "9 images were computed before" in printed.err and "MISSING" not in printed.err
    assert "written: features.parquet (9 images; cls 64, mean 64, pooled 128)" in printed.out
    table = pyarrow.parquet.read_table("features.parquet")
    assert table.schema.field("pooled").type == pyarrow.list_(pyarrow.float32(), 128)
    assert table.column_names == ["image", "label", "split", "cls", "mean", "pooled", "error"]
    for row in table.to_pylist():
        assert Path(row["image"]).parent.name == row["label"] and row["split"] == "train" and row["error"] is None
    expected = np.concatenate([np.stack(table[kind].to_numpy()) for kind in ("cls", "mean", "pooled")], axis=1)
    for suffix in ("csv", "jsonl"):  # the images by themselves have no labels
        assert embed(home, "images/train", "-o", f"features.{suffix}") == 0
        found = read_features(f"features.{suffix}")
        order = sorted(range(9), key=lambda i: table["image"][i].as_py())
        np.testing.assert_allclose(found, expected[order], rtol=1e-4, atol=1e-5)
    rows = [json.loads(line) for line in Path("features.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == sorted(table["image"].to_pylist()) and "label" not in rows[0]


def test_bad_images_have_their_reason_and_the_others_features(home, capsys):
    Path("images/train/healthy/0.png").write_bytes(b"no image")
    assert embed(home, "images/train/healthy", "-o", "features.parquet") == 2
    rows = pyarrow.parquet.read_table("features.parquet").to_pylist()
    assert [row["cls"] is None for row in rows] == [True, False, False] and "0.png" in rows[0]["error"]


def test_streamed_images_have_the_features_of_loaded_ones(home, capsys):
    found = []
    for flags, name in (([], "loaded.jsonl"), (["--streaming"], "streamed.jsonl")):
        assert embed(home, "--data-dir", "images", *flags, "-o", name, "--knn", "3") == 0
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
        found.append(sorted((row["split"], row["label"], [round(value, 3) for value in row["mean"]]) for row in rows))
    assert len(found[0]) == 15 and found[0] == found[1]
    lines = capsys.readouterr().out.splitlines()
    results = [line for line in lines if line.startswith("  ")]
    assert len(results) == 6 and results[:3] == results[3:]
    assert "3 nearest neighbours among 9 images of train, accuracy on 6 images of validation:" in lines


def test_labels_of_other_tasks_are_text(home, capsys):
    paths = sorted(map(str, Path("images/train").rglob("*.png")))[:3]
    rows = ["file_name,a,b", *(f"{path},{n % 2},{int(n < 2)}" for n, path in enumerate(paths))]
    Path("several.csv").write_text("\n".join(rows))
    arguments = ["--labels", "several.csv", "--label-column", "a,b", "-o", "found.jsonl"]
    for task, expected in (("auto", ["b", "a|b", ""]), ("regression", ["a=0|b=1", "a=1|b=1", "a=0|b=0"])):
        assert embed(home, *arguments, "--task", task, "--overwrite") == 0
        assert [json.loads(line)["label"] for line in Path("found.jsonl").read_text().splitlines()] == expected
    shutil.copytree("images/train", "alone/test")
    assert embed(home, "--data-dir", "alone", "--knn", "3") == 0
    assert embed(home, *arguments[:4], "--knn") == 2
    assert "--knn: expected one class per image, found --task multi-label" in capsys.readouterr().err


def test_neighbours_are_the_most_similar_images(home, capsys):
    shutil.copy("images/train/healthy/1.png", "copy.png")
    assert embed(home, "images", "--neighbours", "copy.png", "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "most similar to copy.png:" and len(lines) == 3
    assert lines[1].split() == ["1.000", "images/train/healthy/1.png"]


@pytest.mark.parametrize("alone", [False, True])
def test_votes_of_neighbours_are_weighted_by_similarity(alone):
    generator = np.random.default_rng(0)
    bank, labels = generator.normal(size=(30, 6)).astype(np.float32), generator.integers(0, 3, 30)
    queries, truth = (bank, labels) if alone else (bank[:9] + 0.5, labels[:9])
    right = 0
    for index, (query, label) in enumerate(zip(queries, truth, strict=True)):
        cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        if alone:
            cosines[index] = -9
        votes = np.zeros(3)
        for nearest in np.argsort(-cosines)[:5]:
            votes[labels[nearest]] += np.exp(cosines[nearest] / 0.07)
        right += votes.argmax() == label
    assert measure_neighbours(bank, labels, None if alone else queries, truth, 5) == pytest.approx(right / len(truth))
    assert find_neighbours(bank, bank[4], 3)[0] == (4, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images"], "--output: expected a FILE for the features, or --knn or --neighbours"),
        (["images", "--knn"], "--knn: expected images with labels: --data-dir FOLDER"),
        (["images", "--data-dir", "images", "--knn"], "IMAGE: expected images, or --dataset, --data-dir or --labels"),
        (["images", "-o", "x.txt"], "--output: expected a file ending in .csv, .jsonl, .parquet, got x.txt"),
        (["--data-dir", "images", "--split", "x", "--knn"], "--split: expected one of train, validation, got 'x'"),
        (["images", "--image-size", "30", "-o", "x.csv"], "--image-size: expected a multiple of the patch size (8, 8)"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, home, capsys):
    assert embed(home, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path().glob("*x.*"))
