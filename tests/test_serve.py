"""`fastvit serve`: its answers, its limits, hostile and slow clients, load, and the end under load."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from select import select

import hostile
import numpy as np
import pytest
import torch
from PIL import Image

from fastvit import Predictor, cli

pytest.importorskip("fastapi", reason="fastapi is not installed")
from fastvit.serve.limits import Limits
from fastvit.serve.predictor import preprocess
from fastvit.serve.server import build_server, listen

LEAF = hostile.encode_leaf("JPEG")


class Client:
    """Sends bytes as they are."""

    def __init__(self, port):
        self.port = port

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(self, data, *, half_close=False):
        """Send bytes on a new connection; returns (status, headers, body), status 0 if there is no answer."""
        try:
            with self.connect() as connection:
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                return read_answer(connection)
        except ConnectionRefusedError:
            return 0, {}, b""

    def post(self, *files, path="/classify", **headers):
        return self.send(encode_post(*files, path=path, **headers))

    def get(self, path, **headers):
        return self.send(encode_head(f"GET {path}", headers))

    def read_metric(self, name):
        return float(re.search(rf"^fastvit_{re.escape(name)} (.*)$", self.get("/metrics")[2].decode(), re.MULTILINE)[1])


def read_answer(connection):
    response = HTTPResponse(connection)
    try:
        response.begin()
        return response.status, response.headers, response.read()
    except ConnectionError:  # the server has closed it
        return 0, {}, b""


def encode_head(line, headers):
    lines = [f"{line} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def encode_form(*files, start='--B\r\nContent-Disposition: form-data; name="images"; filename="{}"\r\n\r\n'):
    """Encode (name, content) pairs, or contents, as a form with the boundary "B"."""
    pairs = [file if isinstance(file, tuple) else ("leaf.jpg", file) for file in files]
    return b"".join(start.format(name).encode() + content + b"\r\n" for name, content in pairs) + b"--B--\r\n"


def encode_post(*files, path="/classify", body=None, **headers):
    body = encode_form(*files) if body is None else body
    headers = {"Content-Type": "multipart/form-data; boundary=B", "Content-Length": len(body), **headers}
    return encode_head(f"POST {path}", headers) + body


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hostile.write_files(tmp_path_factory.mktemp("model") / "tiny", hostile.build_checkpoint())


@contextlib.contextmanager
def serve(model, token=None, **limits):
    """Serve in a thread of this process; yields a client and the predictor."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Predictor(model, "cpu") as predictor,
        listen("127.0.0.1", 0) as listener,
    ):
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the server sets it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that an answer may wait for its reader
        server = build_server(predictor, Limits(**limits), token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Client(listener.getsockname()[1]), predictor
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(model):
    with serve(model, max_mb=1, max_megapixels=1, max_files=3) as served:
        yield served


@contextlib.contextmanager
def block_model(predictor):
    """The model does not answer inside of the block."""
    launch, go = predictor._batcher.launch, threading.Event()
    predictor._batcher.launch = lambda images: (go.wait(60), launch(images))[1]
    try:
        yield
    finally:
        go.set()
        predictor._batcher.launch = launch


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_classes(entry, prediction):
    assert [each["label"] for each in entry["classes"]] == [label for label, _ in prediction.top]
    found = [each["probability"] for each in entry["classes"]]
    assert found == pytest.approx([score for _, score in prediction.top], abs=2e-6)


# --- answers ---------------------------------------------------------------------------------------------------------

RED, LIME = (Image.new("RGB", (9, 9), colour) for colour in ("red", "lime"))
GOOD_IMAGES = {
    "photograph": LEAF,
    "animated gif": hostile.encode(RED, "GIF", save_all=True, append_images=[LIME]),
    "16 bits": hostile.encode(Image.fromarray(np.arange(0, 65536, 64, np.uint16).reshape(32, 32)), "PNG"),
    "cmyk": hostile.encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),
    "one row": hostile.encode(Image.new("RGB", (20000, 1), "red"), "PNG"),
}


@pytest.mark.parametrize("kind", GOOD_IMAGES)
def test_an_image_has_the_classes_of_the_predictor_and_an_attention_map(kind, served):
    client, predictor = served
    raw = encode_post(body=GOOD_IMAGES[kind], **{"Content-Type": "image/anything"})
    for status, _, body in (client.post(GOOD_IMAGES[kind]), client.send(raw)):
        assert status == 200
        assert_same_classes(json.loads(body)["results"][0], predictor(GOOD_IMAGES[kind]))
    for view, size in (("overlay", (16, 16)), ("sheet", (824, 462))):
        status, headers, body = client.post(GOOD_IMAGES[kind], path=f"/attention?view={view}")
        assert (status, headers["Content-Type"]) == (200, "image/png") and Image.open(io.BytesIO(body)).size == size
    (entry,) = json.loads(client.post(GOOD_IMAGES[kind], path="/attention?view=map")[2])["results"]
    assert np.shape(entry["attention"]) == (2, 2) and 0 < np.sum(entry["attention"]) < 1
    (entry,) = json.loads(client.post(GOOD_IMAGES[kind], path="/embed")[2])["results"]
    pixels = torch.from_numpy(preprocess(predictor.preprocessor, GOOD_IMAGES[kind], "image").copy())[None]
    expected = predictor.model.forward_features(pixels).cls_token[0]
    assert entry["pooled"] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["multi-label", "regression"])
def test_models_of_other_tasks_answer_as_predict_does(kind, tmp_path, capsys):
    folder, image = hostile.write_files(tmp_path / "tiny", hostile.build_checkpoint()), tmp_path / "leaf.jpg"
    image.write_bytes(LEAF)
    changes = {"problem_type": "multi_label_classification", "label_thresholds": [0, 1, 1]}
    hostile.change_json(folder / "config.json", **({"problem_type": kind} if kind == "regression" else changes))
    assert cli.main(["predict", str(folder), str(image), "--json", "--device", "cpu"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert len(expected["classes"]) == 1 if kind == "multi-label" else len(expected["values"]) == 3
    with serve(folder) as (client, _):
        (entry,) = json.loads(client.post((str(image), LEAF))[2])["results"]
        assert entry == {"index": 0, **expected}


def test_models_of_exported_files_have_neither_features_nor_maps(model):
    with serve(model) as (client, predictor):
        predictor.model = object()
        for path in ("/embed", "/attention"):
            assert client.post(LEAF, path=path)[::2] == (
                501, b'{"detail":"the model is an exported file, which computes classes alone"}'
            )  # fmt: skip


BAD_IMAGES = {
    "zero bytes": (b"", "expected an image, found"),
    "text": (b"words", "expected an image, found"),
    "truncated jpeg": (LEAF[:500], "cannot be decoded"),
    "bomb in the header": (hostile.encode_hollow_png(30_000, 30_000), "expected an image of at most 1,000,000 pixels"),
    "bomb in the data": (hostile.encode(Image.new("1", (2000, 1000)), "PNG"), "expected an image of at most 1,000,000"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_has_an_error_of_its_own(kind, served):
    client, predictor = served
    content, message = BAD_IMAGES[kind]
    for path in ("/classify", "/embed", "/attention"):
        status, _, body = client.post(("bad.png", content), path=path)
        (entry,) = json.loads(body)["results"]
        assert (status, entry["index"], entry["image"]) == (422, 0, "bad.png") and entry["error"].startswith(message)
    status, _, body = client.post(("a", LEAF), ("../../bad", content), ("c", LEAF))
    first, bad, last = json.loads(body)["results"]
    assert status == 200 and (bad["index"], bad["image"]) == (1, "../../bad") and bad["error"].startswith(message)
    for entry in (first, last):
        assert_same_classes(entry, predictor(LEAF))


def test_health_metrics_and_description(served):
    client, _ = served
    assert (client.get("/health")[0], json.loads(client.get("/health")[2])) == (200, {"status": "ready"})
    before = client.read_metric('requests_total{path="/health",status="200"}')
    client.get("/health")
    assert client.read_metric('requests_total{path="/health",status="200"}') == before + 1
    assert {"/classify", "/attention", "/health"} <= json.loads(client.get("/openapi.json")[2])["paths"].keys()
    assert client.get("/docs")[0] == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_commands_of_the_docs(served, own_folder):
    client, _ = served
    for name in ("leaf.jpg", "a.jpg", "b.jpg"):
        Path(name).write_bytes(LEAF)
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    commands = re.findall(r"^curl .*$", page, re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        words = shlex.split(command.replace(":8000", f":{client.port}"))
        subprocess.run([words[0], "--fail", "--silent", "--show-error", *words[1:]], check=True)
    assert Image.open("attention.png").size == (16, 16)


# --- requests that are refused ---------------------------------------------------------------------------------------

TEXT = encode_form(("url", b"http://localhost/"), start='--B\r\nContent-Disposition: form-data; name="{}"\r\n\r\n')
CHUNK = b"%x\r\n%s\r\n" % (2**19, bytes(2**19))
PNG = {"Content-Type": "image/png"}
REQUESTS = {
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "endless headers": (encode_head("GET /health", {"X": "a" * 60_000})[:-4], 400),
    "negative length": (encode_post(LEAF, **{"Content-Length": -1}), 400),
    "two lengths": (encode_head("POST /classify", {"Content-Length": "5", "content-length": "6"}), 400),
    "path traversal": (encode_head("GET /../../etc/passwd", {}), 404),
    "encoded path traversal": (encode_head("GET /docs/%2e%2e/%2e%2e/etc/passwd", {}), 404),
    "other method": (encode_head("GET /classify", {}), 405),
    "no content type": (encode_head("POST /classify", {}), 415),
    "json with a url": (encode_post(body=b'{"url": "http://localhost"}', **{"Content-Type": "application/json"}), 415),
    "form with a url": (encode_post(body=TEXT), 400),
    "file and text": (encode_post(body=encode_form(LEAF).replace(b"--B--\r\n", TEXT)), 400),
    "no files": (encode_post(), 400),
    "charset that decodes nothing": (
        encode_post(LEAF, **{"Content-Type": "multipart/form-data; boundary=B; charset=undefined"}), 400
    ),
    "no boundary": (encode_post(LEAF, **{"Content-Type": "multipart/form-data"}), 400),
    "another boundary": (encode_post(LEAF, **{"Content-Type": "multipart/form-data; boundary=C"}), 400),
    "form that ends early": (encode_post(body=encode_form(LEAF, LEAF)[:-700]), 400),
    "too many files": (encode_post(LEAF, LEAF, LEAF, LEAF), 400),
    "two images for one map": (encode_post(LEAF, LEAF, path="/attention"), 400),
    "unknown view": (encode_post(LEAF, path="/attention?view=/etc/passwd"), 422),
    "large body": (encode_post(bytes(2**21)), 413),
    "announced large body": (encode_head("POST /classify", {**PNG, "Content-Length": 10**15}), 413),
    "large chunks": (
        encode_head("POST /classify", {**PNG, "Transfer-Encoding": "chunked"}) + 3 * CHUNK + b"0\r\n\r\n", 413
    ),
    "surrogate in a file name": (
        encode_post(("\\ud800", LEAF), **{"Content-Type": "multipart/form-data; boundary=B;charset=unicode_escape"}),
        200
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_hostile_request_is_refused_and_leaves_no_trace(kind, served):
    client, _ = served
    data, expected = REQUESTS[kind]
    status, _, body = client.send(data)
    assert status == expected and b"root:" not in body, body
    assert client.get("/health")[0] == 200 and client.read_metric("queue_length") == 0


def test_only_clients_with_the_token_are_answered(model):
    with serve(model, token="se-cret") as (client, _):
        for value in ("", "Bearer", "Bearer wrong", "Bearer se-cres", "Basic se-cret", "Bearer s\xe9-cret"):
            status, headers, _ = client.post(LEAF, Authorization=value)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), value
        assert client.post(LEAF)[0] == client.get("/metrics")[0] == 401
        assert client.post(LEAF, Authorization="bearer se-cret")[0] == 200
        assert client.get("/metrics", Authorization="Bearer se-cret")[0] == client.get("/health")[0] == 200


@pytest.mark.parametrize(
    "options, message",
    [
        (["--port", "70000"], "--port: expected 0 to 65535, got 70000"),
        (["--queue", "0"], "--queue: expected at least 1, got 0"),
        (["--token-file", "missing"], "--token-file: missing: cannot be read ([Errno 2]"),
        (["--token-file", "token"], "--token-file: token: expected one word of ASCII characters"),
        (["--host", "192.0.2.1"], "--host, --port: cannot listen on 192.0.2.1:8000 ([Errno"),
    ],
)
def test_options_that_cannot_be_used_are_one_line_errors(options, message, model, own_folder, capsys):
    Path("token").write_text("two words")
    assert cli.main(["serve", str(model), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_missing_fastapi_is_a_one_line_error(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "fastvit.serve.server")
    assert cli.main(["serve", str(model)]) == 2
    assert capsys.readouterr().err == 'error: serve: expected fastapi to be installed: pip install "fastvit[serve]"\n'


# --- slow clients, and connections that end --------------------------------------------------------------------------

POST = encode_post(LEAF)
SLOW = {  # what a client sends before it becomes slow, the rest, and the status of the answer
    "headers": (b"", POST[:99], 0),
    "body": (POST[:-99], POST[-99:], 408),
    "body that was refused": (POST[:-99].replace(b"multipart", b"m"), POST[-99:], 415),
    "second request": (POST, POST[:99], 200),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_slow_request_ends_after_the_timeout(kind, model):
    data, rest, expected = SLOW[kind]
    with serve(model, timeout=1) as (client, _), client.connect() as connection:
        connection.sendall(data)
        start = time.monotonic()
        status = None
        with pytest.raises(ConnectionError):  # 99 bytes take 20 seconds
            for byte in rest:
                if status is None and select([connection], [], [], 0.2)[0]:
                    status = read_answer(connection)[0]
                connection.sendall(bytes([byte]))
                time.sleep(0.2 if status else 0)
        assert status == expected and 0.9 < time.monotonic() - start < 10
        wait_for(lambda: client.read_metric("queue_length") == 0)


def read_rest(connection):
    with contextlib.suppress(ConnectionError):
        return b"".join(iter(lambda: connection.recv(2**20), b""))
    return b""


def test_a_client_that_does_not_read_its_answers_is_disconnected(model):
    with serve(model, timeout=1) as (client, _), client.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(3 * encode_post(LEAF, path="/attention?view=sheet"))
        wait_for(lambda: client.read_metric("queue_length") == 1)
        wait_for(lambda: client.read_metric("queue_length") == 0)
        assert len(read_rest(connection)) < 100_000 < len(client.post(LEAF, path="/attention?view=sheet")[2])


def test_a_half_closed_connection_is_answered_if_its_request_is_whole(served):
    client, _ = served
    assert client.send(POST, half_close=True)[0] == 200
    assert client.send(POST[:-9], half_close=True)[0] == 0
    wait_for(lambda: client.read_metric("queue_length") == 0)


# --- load ------------------------------------------------------------------------------------------------------------


def test_no_request_of_200_concurrent_clients_is_lost(model):
    """Every 7th image is bad. No client sends before all are connected."""
    barrier = threading.Barrier(200)

    def post(number):
        with client.connect() as connection:
            barrier.wait(60)
            connection.sendall(encode_post(LEAF[: None if number % 7 else 99]))
            return read_answer(connection)[0]

    with serve(model) as (client, _), ThreadPoolExecutor(200) as pool:
        statuses = list(pool.map(post, range(200)))
        assert statuses == [200 if number % 7 else 422 for number in range(200)]
        good = statuses.count(200)
        assert client.read_metric('requests_total{path="/classify",status="200"}') == good
        assert client.read_metric("batch_size_sum") == good > 2 * client.read_metric("batch_size_count")


def test_a_full_queue_refuses_requests_and_answers_those_that_wait(model):
    with serve(model, queue=4) as (client, predictor), ThreadPoolExecutor(4) as pool:
        with block_model(predictor):
            waiting = [pool.submit(client.post, LEAF) for _ in range(4)]
            wait_for(lambda: client.read_metric("queue_length") == 4)
            status, headers, _ = client.post(LEAF)
            assert (status, headers["Retry-After"]) == (429, "1")
            assert client.get("/health")[::2] == (503, b'{"status":"busy"}')
            idle = [client.connect() for _ in range(8)]  # 3 connections for each place in the queue
            wait_for(lambda: client.get("/health")[2] == b"Service Unavailable")
            for connection in idle:
                connection.close()
        assert [each.result()[0] for each in waiting] == [200] * 4
        wait_for(lambda: client.get("/health")[0] == 200)


def test_an_interrupted_command_answers_what_it_has_accepted(model, capsys, monkeypatch):
    """The command runs in the main thread of this process, and is interrupted while 40 requests wait for the model."""
    predictors: list[Predictor] = []
    start = Predictor.__enter__
    monkeypatch.setattr(Predictor, "__enter__", lambda self: predictors.append(self) or start(self))

    def interrupt():
        printed = ""
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", printed)):
                time.sleep(0.05)
                printed += capsys.readouterr().out
            client = Client(int(found[1]))
            with ThreadPoolExecutor(40) as pool, block_model(predictors[0]):
                waiting = [pool.submit(client.post, LEAF) for _ in range(40)]
                wait_for(lambda: client.read_metric("queue_length") == 40)
                os.kill(os.getpid(), signal.SIGINT)
                wait_for(lambda: client.get("/health")[0] == 0)  # no connection is accepted
            return [each.result()[0] for each in waiting]
        except BaseException:
            os.kill(os.getpid(), signal.SIGINT)
            raise

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a command; other tests may leave theirs
    try:
        with ThreadPoolExecutor(1) as pool:
            statuses = pool.submit(interrupt)
            assert cli.main(["serve", str(model), "--device", "cpu", "--port", "0"]) == 130
            assert statuses.result() == [200] * 40
    finally:
        signal.signal(signal.SIGINT, before)
