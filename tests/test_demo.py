"""The page of `fastvit demo`: its results, the interface it listens on, and that it makes no requests."""

import importlib.util
import json
import re
import socket
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, browser  # noqa: F401
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil

import fastvit
from fastvit import cli
from fastvit.data import leaves
from fastvit.serve import demo
from fastvit.serve.predictor import Predictor

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
NAMES = ["angular_leaf_spot", "<img src=x onerror=alert(1)>", "healthy"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)},
    )  # fmt: skip
    fastvit.ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def addresses():
    """The addresses that this process looks up and connects to, recorded by an audit hook."""
    addresses: list[str] = []
    is_over = False

    def record(event, arguments):
        if is_over:
            return
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            addresses.append(str(arguments[1][0]))
        elif event == "socket.getaddrinfo":
            addresses.append(str(arguments[0]))

    sys.addaudithook(record)
    yield addresses
    is_over = True  # audit hooks cannot be removed


@pytest.fixture(scope="module")
def url(model, addresses, tmp_path_factory):
    """The URL of the demo, served on loopback while the tests of this module run."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = demo.build_demo_page(str(model), "cpu")
        try:
            yield demo.serve_page(page)
        finally:
            page.close(verbose=False)


@pytest.fixture(scope="module")
def image_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "leaf.png"
    leaves.draw_leaf("healthy", seed=3, size=48).save(path)
    return path


@needs_gradio
def test_results_equal_the_predictor_and_include_an_attention_map(url, model, image_path):
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)
    answer, attention = client.predict(handle_file(str(image_path)), api_name="/predict")
    found = {entry["label"]: entry["confidence"] for entry in answer["confidences"]}
    with Predictor(model, "cpu") as predictor:
        expected = predictor(image_path).probabilities
    assert found == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-5)
    shown = np.asarray(Image.open(attention).convert("RGB")).astype(int)
    assert shown.shape == (demo.MAP_SIDE, demo.MAP_SIDE, 3) and shown.std() > 5


@needs_gradio
def test_file_that_is_not_an_image_raises(url, tmp_path):
    from gradio_client import Client, handle_file

    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(Exception, match="The file: expected an image, found a file in none of these formats"):
        Client(url, verbose=False).predict(handle_file(str(tmp_path / "bad.png")), api_name="/predict")


@needs_gradio
def test_page_listens_on_loopback_only_and_makes_no_requests(url, addresses):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
    html = urllib.request.urlopen(url).read().decode()
    assert "fastvit" in html and "fonts.googleapis" not in html
    assert json.load(urllib.request.urlopen(f"{url}config"))["analytics_enabled"] is False
    port = int(url.rsplit(":", 1)[1].rstrip("/"))
    others = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None)} - {
        "127.0.0.1",
        "127.0.1.1",
        "::1",
    }
    for address in others:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2).close()
    assert "127.0.0.1" in addresses
    assert set(addresses) <= {"127.0.0.1", "localhost", *others, socket.gethostname()}


@needs_gradio
def test_uploaded_image_is_classified_in_a_browser_without_a_network(browser: Browser, url, image_path):  # noqa: F811
    browser.open(url)
    browser.driver.implicitly_wait(20)
    browser.driver.find_element("css selector", "input[type=file]").send_keys(str(image_path))
    label = browser.driver.find_element("css selector", "[data-testid=label-output-value], .output-class")
    assert label.text in NAMES
    assert browser.driver.find_element("css selector", "[data-testid=detailed-image], .image-frame img")
    requests = browser.list_requests()
    assert requests and all(one.startswith((url, "blob:", "ws://127.0.0.1")) for one in requests)


def test_missing_gradio_is_a_one_line_error(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", str(model)]) == 2
    assert capsys.readouterr().err == ('error: demo: expected Gradio to be installed: pip install "fastvit[demo]"\n')


@needs_gradio
def test_occupied_port_is_a_one_line_error(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["demo", str(model), "--device", "cpu", "--port", str(port)]) == 2
    assert f"error: --host, --port: cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "70000"])
def test_invalid_port_is_a_one_line_error(port, model, capsys):
    assert cli.main(["demo", str(model), "--port", port]) == 2
    assert capsys.readouterr().err == f"error: --port: expected 1 to 65535, got {port}\n"
