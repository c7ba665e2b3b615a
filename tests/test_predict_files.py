"""`fastvit predict` and `attention` of folders, patterns and datasets, and output files that continue."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from launch import launch, read_output, run_predict
from PIL import Image
from test_user_errors import NAMES, save_model

from fastvit import cli
from fastvit.cli import attention, predict
from fastvit.errors import InputError
from fastvit.serve.predictor import Predictor
from fastvit.serve.sources import list_sources


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Five images in photos/, a/b.PNG and a/c.jpg among them, beside files that are none, and a damaged one in bad/."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("photos/1.png", "photos/2.jpg", "photos/a/b.PNG", "photos/a/c.jpg", "photos/[x].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(name)
    Path("photos/notes.txt").write_text("no image")
    Path("photos/.hidden.png").write_bytes(b"no image")
    Path("bad").mkdir()
    Path("bad/bad.png").write_bytes(b"no image")
    return Path("photos")


ALL = ["photos/1.png", "photos/2.jpg", "photos/[x].png", "photos/a/b.PNG", "photos/a/c.jpg"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["photos"], ALL),
        (["photos/"], ALL),
        (["photos/**"], sorted(ALL)),
        (["photos/*.png"], ["photos/1.png", "photos/[x].png"]),
        (["photos/**/*.jpg"], ["photos/2.jpg", "photos/a/c.jpg"]),
        (["photos/a", "photos/1.png"], ["photos/a/b.PNG", "photos/a/c.jpg", "photos/1.png"]),
        (["photos/[x].png"], ["photos/[x].png"]),  # a file of this name comes before a pattern
        (["photos/1.png", "photos/none.png"], ["photos/1.png", "photos/none.png"]),
    ],
)
def test_folders_and_patterns_become_their_images(arguments, expected, photos):
    assert [source.name for source in list_sources(arguments)] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos/*.gif"], "expected a pattern that matches images, it matches none"),
        (["empty"], "expected a folder with images, found none in it"),
        (["photso/1.png"], "photso/1.png: no such file or folder; did you mean 'photos/1.png'?"),
        (["photos/1.pgn", "x"], "photos/1.pgn: no such file or folder; did you mean 'photos/1.png'?"),
        ([], "IMAGE: expected images or a --dataset, got neither"),
        (["photos", "--dataset", "generated"], "IMAGE: expected images or a --dataset, got both"),
        (["photos", "--split", "test"], "--split: expected with --dataset only"),
        (["photos", "-o", "out.txt"], "--output: expected a file ending in .csv, .jsonl, .parquet"),
        (["photos", "-o", "no/out.csv"], "--output: no such folder: no"),
    ],
)
def test_inputs_without_images_are_an_error_at_once(arguments, message, photos, model, capsys):
    Path("empty").mkdir()
    capsys.readouterr()
    assert cli.main(["predict", model, *arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_split_of_a_dataset_is_classified(model, monkeypatch, capsys):
    from fastvit.data import datasets
    from fastvit.serve import sources

    monkeypatch.setattr(sources, "load_images", lambda *args, **kwargs: datasets.generate_dataset(40, 32, 0))
    assert cli.main(["predict", model, "--dataset", "generated", "--json", "--device", "cpu"]) == 0
    names = [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"validation/{index}" for index in range(len(names))] and names


def read_rows(path):
    if path.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    lines = Path(path).read_text().splitlines()
    return [json.loads(line) for line in lines] if path.endswith(".jsonl") else list(csv.DictReader(lines))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_output_file_has_every_image_once_with_its_classes(suffix, photos, model, capsys):
    path = f"out{suffix}"
    assert cli.main(["predict", model, "photos", "photos/1.png", "bad", "-o", path, "--device", "cpu"]) == 2
    assert "written: " in capsys.readouterr().out
    rows = read_rows(path)
    assert [row["image"] for row in rows] == [*ALL, "bad/bad.png"]
    with Predictor(model, "cpu") as predictor:
        expected = predictor("photos/1.png")
    if suffix == ".jsonl":
        assert [entry["label"] for entry in rows[0]["classes"]] == [label for label, _ in expected.top]
        assert rows[0]["classes"][0]["probability"] == pytest.approx(expected.score, abs=1e-5)
        assert "expected an image" in rows[-1]["error"] and "classes" not in rows[-1]
    else:
        assert rows[0]["label"] == expected.label and "expected an image" in rows[-1]["error"]
        assert float(rows[0]["probability"]) == pytest.approx(expected.score, abs=1e-5)
        assert not rows[0]["error"] and not rows[-1]["label"]
    if suffix == ".csv":
        assert rows[0]["label_3"] == expected.top[2][0]
    assert not list(Path().glob(".out*"))


def test_interrupted_output_continues_and_a_broken_last_line_is_done_again(photos, model, monkeypatch, capsys):
    command = ["predict", model, "photos", "-o", "out.csv", "--batch-size", "1", "--device", "cpu"]
    assert cli.main(command) == 0
    expected = Path("out.csv").read_text()
    Path("out.csv").unlink()

    stream, classified = Predictor.stream, []

    def interrupt(self, images, **options):
        for count, result in enumerate(stream(self, images, **options)):
            if count == 3:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "stream", interrupt)
        assert cli.main(command) == 130
    journal = Path(".out.csv.journal")
    assert not Path("out.csv").exists() and journal.read_text().count("\n") == 4
    journal.write_text(journal.read_text()[:-7])  # killed while a line was written

    def record(self, images, **options):
        images = list(images)
        classified.extend(images)
        return stream(self, images, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "stream", record)
        assert cli.main(command) == 0
    assert classified == ALL[2:]
    assert Path("out.csv").read_text() == expected
    assert "2 of 5 images were classified before" in capsys.readouterr().err


def test_output_of_another_model_or_option_is_not_continued(photos, model, capsys, monkeypatch):
    def fail(self, images, **options):
        raise KeyboardInterrupt

    command = ["predict", model, "photos", "-o", "out.csv", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "stream", fail)
        assert cli.main(command) == 130
    assert cli.main([*command, "--top", "2"]) == 2
    assert "out.csv was started with top 3, now 2: continue with the same, or start over" in capsys.readouterr().err
    monkeypatch.setattr(predict, "compute_fingerprint", lambda model: 1)  # trained anew in the same folder
    assert cli.main(command) == 2
    assert "out.csv was started with weights" in capsys.readouterr().err
    assert cli.main([*command, "--top", "2", "--overwrite"]) == 0
    assert cli.main(command) == 2
    assert "out.csv exists already" in capsys.readouterr().err


def test_several_processes_share_the_images_and_continue_with_another_number(photos, model, monkeypatch, capsys):
    command = ["predict", model, "photos", "bad", "-o", "out.csv", "--batch-size", "1", "--device", "cpu"]
    assert cli.main(command) == 2
    expected, journals = Path("out.csv").read_text(), [Path(".out.csv.journal"), Path(".out.csv.journal-1")]
    Path("out.csv").unlink()
    codes = launch(run_predict, command, 1, logs=Path("interrupted"))  # both after their first image
    assert codes == {0: 130, 1: 130} and not Path("out.csv").exists()
    done = [json.loads(line)["image"] for path in journals for line in path.read_text().splitlines()[1:]]
    assert done == ALL[:2]
    journals[1].write_text(journals[1].read_text()[:-7])  # killed while it wrote a line
    assert launch(run_predict, command, logs=Path("three"), processes=3) == {0: 2, 1: 0, 2: 0}
    assert Path("out.csv").read_text() == expected and not any(path.exists() for path in journals)
    assert "1 of 6 images were classified before" in read_output(Path("three"), 0, "stderr")
    assert "written: out.csv (6 images; 1 could not be read" in read_output(Path("three"), 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["predict", model, "photos"]) == 2
    assert "--output: expected a file for several processes" in capsys.readouterr().err


def test_attention_of_a_folder_is_a_folder_of_images(photos, model, capsys):
    Path("photos/a/1.jpg").write_bytes(Path("photos/2.jpg").read_bytes())
    assert cli.main(["attention", model, "photos", "bad", "-o", "maps", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "bad.png: expected an image" in captured.err
    assert {path.name for path in Path("maps").iterdir()} == {"1.png", "2.png", "[x].png", "b.png", "c.png", "1-2.png"}
    assert sum(any(name in line for name in NAMES) for line in captured.out.splitlines()) == 6


def test_several_attention_images_need_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert attention.choose_targets(["a.jpg"], None) == [Path("attention.png")]
    with pytest.raises(InputError, match=r"--output: expected a folder for 2 images, got maps.png"):
        attention.choose_targets(["a.jpg", "b.jpg"], Path("maps.png"))
    assert attention.choose_targets(["test/0", "test/1"], None) == [
        Path("attention/test-0.png"),
        Path("attention/test-1.png"),
    ]
