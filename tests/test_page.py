"""The report page of a run: its content, size, escaping, and behaviour in a browser."""

import dataclasses
import datetime
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, browser, to_file_url  # noqa: F401
from PIL import Image

from fastvit.data import leaves
from fastvit.report.charts import Series, compute_ticks, describe_series, downsample, draw_line_chart, format_thousands
from fastvit.report.tasks import MAX_MISTAKES, evaluate_confusion
from fastvit.train import page
from fastvit.train.finetune import main
from fastvit.train.page import Mistake, RunReport

HOSTILE = ["<img src=x onerror=alert(1)>", '"><script>alert(2)<', "&amp;{{ 7 * 7 }}"]


def make_noise(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def make_run(num_classes: int = 3, **changes) -> RunReport:
    """A run of 300 steps on classes named class 0, class 1, ..., with misclassified validation images."""
    names = [f"class {index}" for index in range(num_classes)]
    confusion = np.diag(np.full(num_classes, 9)) + np.roll(np.diag(np.arange(num_classes) % 3), 1, axis=1)
    history = []
    for step in range(10, 310, 10):
        history.append({
            "step": step, "epoch": step / 100, "loss": 3 / step, "learning_rate": 1e-3 - step * 3e-6,
            "images_per_second": 200.0, "memory_gib": 1.0, "peak_memory_gib": 1.5,
        })  # fmt: skip
        if step % 100 == 0:
            history.append({"step": step, "eval_loss": 1.0, "eval_accuracy": 0.5 + step / 1000})
    run = RunReport(
        folder="runs/a run",
        dataset="some images",
        model="A model",
        class_names=names,
        num_images="1,234",
        counts={"train": np.arange(num_classes) + 5, "validation": confusion.sum(axis=1)},
        examples={name: [make_noise(96, index)] * 6 for index, name in enumerate(names[: page.MAX_EXAMPLE_CLASSES])},
        history=history,
        best_step=200,
        seconds=75.0,
        evaluations={"validation": evaluate_confusion(confusion, changes.get("class_names", names))},
        mistakes=[Mistake(7, names[1], names[2], 0.987, make_noise(192), make_noise(192, 1))] * MAX_MISTAKES,
        mistakes_in="validation",
        options={"epochs": (3.0, 4.0), "cpu": (False, False)},
        environment={"device": "a machine"},
        finished=datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
    )
    return dataclasses.replace(run, **changes)


def extract_text(html: str) -> str:
    """Approximately the visible text: without styles, scripts and tags."""
    body = re.sub(r"(?s)<(style|script).*?</\1>", "", html)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)).replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of a short run on drawn leaves whose class names contain HTML."""
    root = tmp_path_factory.mktemp("run")
    for split, count in (("train", 12), ("val", 6), ("test", 3)):
        for kind, name in zip(leaves.CLASSES, HOSTILE, strict=True):
            (root / "images" / split / name).mkdir(parents=True)
            for seed in range(count):
                image = leaves.draw_leaf(kind, seed=seed, size=32)
                image.save(root / "images" / split / name / f"{seed}.png")
    options = ["--data-dir", str(root / "images"), "--output-dir", str(root / "out & <out>"), "--max-steps", "6"]
    options += ["--from-scratch", "micro", "--image-size", "32", "--patch-size", "8", "--precision", "fp32", "--cpu"]
    assert main([*options, "--eval-steps", "3", "--batch-size", "4", "--logging-steps", "1"]) == 0
    return root / "out & <out>" / "report.html"


# ---------------------------------------------------------------------------------------------------------------------
# Content
# ---------------------------------------------------------------------------------------------------------------------


def test_finetune_writes_a_page_with_the_results_of_the_run(report):
    folder = report.parent
    html = report.read_text(encoding="utf-8")
    text = extract_text(html)
    for prefix, split in (("eval", "Validation"), ("test", "Test")):
        results = json.loads((folder / f"{prefix}_results.json").read_text())
        assert f"{split} accuracy {page.format_percent(results[f'{prefix}_accuracy'])}".replace("\xa0", " ") in text
        assert f"{split} macro F1 {results[f'{prefix}_macro_f1']:.3f}" in text
    state = json.loads((folder / "trainer_state.json").read_text())
    assert f"Best model step {state['best_global_step']} of 6" in text
    for record in state["log_history"]:
        if "loss" in record:
            assert record["images_per_second"] > 0 and record["peak_memory_gib"] >= 0.9 * record["memory_gib"] > 0
            assert f"{record['loss']:.4f}" in text
    assert html.count("<svg") == 5  # loss, accuracy, learning rate, speed, memory
    wrong = round(18 * (1 - json.loads((folder / "eval_results.json").read_text())["eval_accuracy"]))
    assert wrong > 0 and html.count("Its attention map") == min(wrong, MAX_MISTAKES)
    assert "max-steps 6 -1" in text and "transformers" in text and "Python" in text
    assert "fastvit predict &#39;" in html and "out &amp; &lt;out&gt;" in html
    assert html.count("data:image/jpeg;base64,") == 2 * min(wrong, MAX_MISTAKES) + 3 * page.EXAMPLES_PER_CLASS
    changed = re.search(r"(?s)<caption>Options that differ.*?</table>", html)[0]
    assert set(re.findall(r'<th scope="row">([\w-]+)</th>', changed)) == {
        "data-dir", "output-dir", "max-steps", "from-scratch", "image-size", "patch-size", "precision", "cpu",
        "eval-steps", "batch-size", "logging-steps", "recipe",
    }  # fmt: skip


def test_confusion_matrix_and_metrics_are_tables_with_captions_and_scopes():
    html = page.render(make_run())
    matrix = re.search(r'(?s)<table class="matrix">.*?</table>', html)[0]
    rows = [re.findall(r"<td[^>]*>(\d+)</td>", row) for row in re.findall(r"(?s)<tr>.*?</tr>", matrix)]
    assert [row for row in rows if row] == [["9", "0", "0"], ["0", "9", "1"], ["2", "0", "9"]]
    for table in re.findall(r"(?s)<table.*?</table>", html):
        assert "<caption" in table
        assert all("scope=" in head for head in re.findall(r"<th\b[^>]*>", table))
    text = extract_text(html)
    assert "class 2 0.900 0.818 0.857 11" in text
    assert "class 1 , predicted class 2 with probability 98.7 % validation image 7" in text
    assert "epochs 3.0 4.0" in text and "Default options (1)" in text


def test_heading_levels_are_consecutive_and_links_have_targets():
    html = page.render(make_run())
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    assert all(re.search(r'alt="[^"]+"', image) for image in re.findall(r"<img[^>]*>", html))
    assert all('role="img" aria-label="' in chart for chart in re.findall(r"<svg[^>]*>", html))


def test_names_are_escaped_everywhere():
    names = [*HOSTILE, "콩잎 녹병", "half \udc80 of a pair", "two\nlines\x00", "x" * 5000, "snake_case"]
    run = make_run(len(names), class_names=names, folder="runs/$(rm -rf ~)'\"<b>", dataset=HOSTILE[0])
    run = dataclasses.replace(
        run,
        examples={name: [make_noise(8)] for name in names},
        mistakes=[Mistake(1, names[0], names[1], 1.0, make_noise(8), make_noise(8))],
        options={"data_dir": (HOSTILE[1], None)},
        environment={"device": HOSTILE[0]},
    )
    html = page.render(run)
    assert "<script>alert" not in html and "<img src=x" not in html and "<b>" not in re.sub(r"<b>&lt;img", "", html)
    assert "&lt;img src=x onerror=alert(1)&gt;" in html and "{{ 7 * 7 }}" in html and "49" not in extract_text(html)
    assert "&gt;alert(2)&lt;" in html and "snake_<wbr>case" in html
    assert "콩잎 녹병" in html and "xxx…" in html and "x" * 200 not in html
    html.encode("utf-8")
    (predict,) = re.findall(r"<code>fastvit predict (.*?) image\.jpg</code>", html)
    assert predict.startswith("&#39;runs/$(rm")  # quoted for the shell


def test_page_of_many_classes_stays_small_and_names_what_it_omits():
    run = make_run(
        1000, mistakes=[Mistake(1, "a" * 90, "b" * 90, 0.9, make_noise(400), make_noise(400))] * MAX_MISTAKES
    )
    run.history.extend({"step": step, "loss": 1.0} for step in range(310, 200_000))
    html = page.render(run)
    assert len(html) < 3e6
    text = extract_text(html)
    assert "The 40 of 1000 classes with the lowest F1" in text
    assert "Images per class: the largest and smallest classes, 40 of 1000" in text
    assert "1000 classes are too many for a matrix" in text and '<table class="matrix">' not in html
    assert "Training images of the first 20 of 1000 classes" in text
    assert "steps are omitted" in text
    assert html.count("<tr") < 250
    assert max(map(len, re.findall(r' d="(M[^"]+)"', html))) < 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": {}, "mistakes": [], "mistakes_in": None}, "neither validation nor test images"),
        ({"mistakes": []}, "None: all validation images were classified correctly."),
        ({"history": [], "best_step": None}, "No values were logged: the run ended before the first logging step."),
    ],
)
def test_page_has_a_message_in_place_of_missing_results(changes, message):
    assert message in extract_text(page.render(make_run(**changes)))


# ---------------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1.19, [0, 0.5, 1, 1.5]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (0.46, 0.69, [0.4, 0.5, 0.6, 0.7]),
        (0, 1500, [0, 500, 1000, 1500]),
        (-3, 5, [-4, -2, 0, 2, 4, 6]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, ticks):
    assert compute_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("value", [0.0, 7.0, -2.5, 1e-9])
def test_ticks_of_a_single_value_cover_it(value):
    ticks = compute_ticks(value, value)
    assert len(ticks) >= 2 and ticks[0] <= value <= ticks[-1]


def test_line_coordinates_are_proportional_to_the_values():
    chart = draw_line_chart("t", [Series("a", [(0, 0.0), (50, 10.0), (100, 5.0)])], x_label="step")
    (path,) = re.findall(r'class="line first" d="M([^"]+)"', chart)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split()) for point in path.split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x0 < x1
    assert y0 - y2 == pytest.approx((y0 - y1) / 2, abs=0.11) and y1 < y2 < y0  # SVG's y axis points down
    assert draw_line_chart("t", [Series("a", [])], x_label="step") == ""


def test_long_series_are_downsampled_to_means_of_neighbours():
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    few = downsample(points)
    assert len(few) == 400 and all(0.4 < y < 0.6 for _, y in few)
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert downsample(points[:7]) == points[:7]


def test_chart_has_a_description_for_screen_readers():
    series = Series("loss", [(10, 2.0), (20, 0.5), (30, 1.0)])
    assert describe_series(series, "step", "{:g}".format) == (
        "loss: from 2 at step 10 to 1 at step 30, lowest 0.5 at 20, highest 2 at 10"
    )
    assert 'aria-label="Loss. loss: from 2 at step 10' in draw_line_chart("Loss", [series], x_label="step")
    assert [format_thousands(value) for value in (0.5, 1500, 20_000, 1_500_000, 12_345)] == [
        "0.5", "1,500", "20k", "1.5M", "12,345",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------


def test_page_makes_no_requests_and_logs_no_errors(browser: Browser, report):  # noqa: F811
    browser.open(to_file_url(report))
    assert browser.list_requests() == [to_file_url(report)]
    assert browser.read_console() == []
    assert browser.run_script("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    shown = browser.run_script("return [...document.querySelectorAll('.examples h4')].map(one => one.textContent)")
    assert sorted(shown) == sorted(HOSTILE)
    # The content security policy blocks requests and scripts even if the escaping had a gap.
    browser.run_script("const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image)")
    browser.run_script(
        "const script = document.createElement('script'); script.text = 'window.mine = 1'; document.body.append(script)"
    )
    assert browser.run_script("return window.mine") is None
    assert any("Content Security Policy" in line for line in browser.read_console())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_follow_the_colour_scheme_with_sufficient_contrast(browser: Browser, report, dark):  # noqa: F811
    browser.open(to_file_url(report), dark=dark)
    paper = browser.run_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.05) == dark
    for selector in ("p.lead", "td", "th", "a", "caption", "summary", ".copy button", ".cards .wrong", "figcaption"):
        ink = browser.run_script("return getComputedStyle(document.querySelector(arguments[0])).color", selector)
        light, dim = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dim + 0.05) >= 4.5, selector  # WCAG AA


def luminance(colour: str) -> float:
    """The relative luminance of rgb(...), as defined by WCAG."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("num_classes", [3, 20, 1000])
def test_page_fits_the_width_of_a_phone(browser: Browser, num_classes, tmp_path):  # noqa: F811
    run = make_run(num_classes)
    long = [f"{name} {'with_a_rather_long_name' * 3}" for name in run.class_names]
    run = dataclasses.replace(run, class_names=long, folder="runs/" + "w" * 200, dataset="d" * 200)
    (tmp_path / "page.html").write_text(page.render(run), encoding="utf-8")
    browser.open(to_file_url(tmp_path / "page.html"), width=360)
    browser.run_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.run_script("return innerWidth") == 360
    assert browser.run_script("return document.scrollingElement.scrollWidth") <= 360
    assert browser.run_script("return [...document.querySelectorAll('.chart')].every(one => one.clientWidth > 250)")
    wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)"
    assert browser.run_script(f"return {wide}.every(box => box.tabIndex === 0 && box.getAttribute('aria-label'))")


def test_keyboard_focus_reaches_every_control_and_is_visible(browser: Browser, report):  # noqa: F811
    browser.open(to_file_url(report))
    expected = browser.run_script(
        "return document.querySelectorAll('a, button, summary, [tabindex]:not(details:not([open]) *)').length"
    )
    reached = set()
    for _ in range(expected):
        browser.press("\ue004")  # Tab
        reached.add(browser.run_script("return [...document.querySelectorAll('*')].indexOf(document.activeElement)"))
        assert browser.run_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert len(reached) == expected > 15
    browser.run_script("document.querySelector('summary').focus()")
    browser.press("\ue007")  # Enter
    assert browser.run_script("return document.querySelector('details').open")


@pytest.mark.parametrize("clipboard", [True, False], ids=["clipboard", "without"])
def test_copy_button_copies_its_code_block(browser: Browser, report, clipboard):  # noqa: F811
    browser.open(to_file_url(report))
    if not clipboard:  # as in browsers that deny it to local files
        browser.run_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    browser.run_script("document.querySelectorAll('.copy button')[1].focus()")
    browser.press("\ue007")
    browser.run_script("const box = document.createElement('textarea'); box.id = 'box'; document.body.append(box)")
    wait_until(lambda: browser.run_script("return document.getElementById('copy-status').textContent") == "Copied.")
    assert browser.run_script("return document.querySelectorAll('.copy button')[1].textContent") == "Copied"
    browser.run_script("document.getElementById('box').focus()")
    browser.press("v", holding="\ue009")  # Control
    pasted = browser.run_script("return document.getElementById('box').value")
    assert pasted == browser.run_script("return document.querySelectorAll('.copy code')[1].textContent")
    assert pasted.startswith("fastvit demo ")


def wait_until(condition) -> None:
    for _ in range(100):
        if condition():
            return
    pytest.fail("the condition did not become true")
