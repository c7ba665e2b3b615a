"""`fastvit serve MODEL`: HTTP around a Predictor, by FastAPI and uvicorn.

    connection -> uvicorn -> token -> place in the queue -> body -> Predictor: decode, batch over all requests -> answer

Images are bytes that a client sends. A client names no path, URL or option of the model; nothing is written to disk.
"""

import asyncio
import hmac
import io
import socket
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import prometheus_client
import torch
import uvicorn
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastvit import __version__
from fastvit.data.images import to_bands
from fastvit.errors import InputError, escape_unprintable
from fastvit.models.features import compute_pooled
from fastvit.report import figures
from fastvit.serve.attention import classify_with_attention
from fastvit.serve.limits import Limits
from fastvit.serve.output import build_record
from fastvit.serve.predictor import Prediction, Predictor

CONNECTIONS_PER_PLACE = 3  # connections for each place in the queue; uvicorn answers 503 to further ones
MAX_NAME = 200  # characters of a file name in an answer
FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
FORM = {"type": "object", "properties": {"images": {"type": "array", "items": FILE}}}
BODY = {"requestBody": {"content": {"multipart/form-data": {"schema": FORM}, "image/*": {"schema": FILE}}}}

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
Uploads = list[tuple[str, bytes]]  # (file name for the answer, content) of each image of a request


class ImageServer:
    """What the routes share: the queue, the metrics and the model's lock."""

    def __init__(self, predictor: Predictor, limits: Limits, token: str | None):
        self.predictor, self.limits, self.token = predictor, limits, token
        self.num_waiting = 0
        self.callers = CapacityLimiter(2 * predictor._batcher.max_batch)  # fill a batch while another one is computed
        self.single = CapacityLimiter(1)
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("fastvit_requests", "Answers", ["path", "status"], registry=registry)
        self.seconds = Histogram("fastvit_request_seconds", "Time to the answer", ["path"], registry=registry)
        queue = Gauge("fastvit_queue_length", "Requests without an answer", registry=registry)
        queue.set_function(lambda: self.num_waiting)
        sizes = [2**n for n in range(10)]
        batch_sizes = Histogram("fastvit_batch_size", "Images per batch", buckets=sizes, registry=registry)
        self.model_lock = threading.Lock()  # attention maps may need another implementation of attention
        launch = predictor._batcher.launch

        def launch_observed(images: list[Any]) -> Callable[[], Any]:
            batch_sizes.observe(len(images))
            with self.model_lock:
                return launch(images)

        predictor._batcher.launch = launch_observed

    async def measure(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """ASGI middleware: count requests by status, and observe their seconds."""
        start, status = time.perf_counter(), 500

        async def send_observed(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, send_observed)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # never text of a client
            self.requests.labels(path, status).inc()
            self.seconds.labels(path).observe(time.perf_counter() - start)

    async def check_token(self, given: Bearer) -> None:
        if self.token and not hmac.compare_digest((given.credentials if given else "").encode(), self.token.encode()):
            raise HTTPException(401, "expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    async def accept(self, request: Request) -> AsyncGenerator[Uploads, None]:
        """Read the images of a request, which has a place in the queue until it is answered."""
        if self.num_waiting >= self.limits.queue:
            raise HTTPException(429, f"{self.num_waiting} requests are waiting", {"Retry-After": "1"})
        self.num_waiting += 1
        try:
            try:
                async with asyncio.timeout(self.limits.timeout):
                    uploads = await read_uploads(request, self.limits)
            except (TimeoutError, ClientDisconnect):
                raise HTTPException(408, "the body did not arrive in time", {"Connection": "close"}) from None
            yield uploads
        finally:
            self.num_waiting -= 1

    def preprocess(self, uploads: Uploads) -> list[np.ndarray | InputError]:
        if not hasattr(self.predictor.model, "classifier"):
            raise HTTPException(501, "the model is an exported file, which computes classes alone")
        return [get() for get in self.predictor._decode(list(enumerate(content for _, content in uploads)))]

    def embed(self, uploads: Uploads) -> Response:
        results: list[Any] = self.preprocess(uploads)
        good = [index for index, each in enumerate(results) if not isinstance(each, InputError)]
        if good:
            pixels = torch.from_numpy(np.stack([results[index] for index in good]))
            with self.model_lock:
                pooled = compute_pooled(self.predictor.model, pixels).tolist()
            for index, features in zip(good, pooled, strict=True):
                results[index] = {"pooled": features}
        return build_answer(uploads, results)

    def draw_attention(self, uploads: Uploads, view: str) -> Response:
        if len(uploads) > 1:
            raise HTTPException(400, f"expected one image, got {len(uploads)}")
        (pixels,) = self.preprocess(uploads)
        if isinstance(pixels, InputError):
            return build_answer(uploads, [pixels])
        with self.model_lock:
            result = classify_with_attention(self.predictor.model, torch.from_numpy(np.stack([pixels])))
        if view == "map":
            return build_answer(uploads, [{"attention": figures.compute_last_layer(*result[1:]).tolist()}])
        draw = figures.draw_attention_sheet if view == "sheet" else figures.overlay_last_layer
        file = io.BytesIO()
        draw(to_bands(pixels).convert("RGB"), *result[1:]).save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")


class UploadParser(MultiPartParser):
    """Starlette's parser, which alone would accept a body that ends early, without its last file."""

    is_complete = False

    def on_end(self) -> None:
        self.is_complete = True


async def read_uploads(request: Request, limits: Limits) -> Uploads:
    """Read the images of a request: the files of a form, or a body that is one image."""
    left = limits.max_mb * 2**20
    too_large = HTTPException(413, f"expected a body of at most {limits.max_mb} MiB")
    if int(request.headers.get("content-length", 0)) > left:
        raise too_large

    async def read_body() -> AsyncGenerator[bytes, None]:
        nonlocal left
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                raise too_large
            yield chunk

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [("", b"".join([chunk async for chunk in read_body()]))]
    if kind != "multipart/form-data":
        raise HTTPException(415, f"expected multipart/form-data, or an image as image/..., got {kind!r}")
    parser = UploadParser(request.headers, read_body(), max_files=limits.max_files)
    parser.spool_max_size = left  # keeps files in memory
    try:
        fields = (await parser.parse()).multi_items()
    except (MultiPartException, UnicodeError) as error:  # some charsets decode nothing
        raise HTTPException(400, f"the form cannot be read ({error})") from None
    files = [file for _, file in fields if isinstance(file, UploadFile)]
    if not parser.is_complete or not files or len(files) < len(fields):
        raise HTTPException(400, f"expected a complete form of files, got the fields {[name for name, _ in fields]}")
    return [(escape_unprintable(file.filename or "")[:MAX_NAME], await file.read()) for file in files]


def build_answer(uploads: Uploads, results: list[Any]) -> Response:
    """Build the answer: an entry with the result or the InputError of each image. 422 if no image could be used."""
    entries = []
    for index, ((name, _), result) in enumerate(zip(uploads, results, strict=True)):
        if isinstance(result, InputError):
            record = build_record(name, [], str(result).removeprefix(f"images[{index}]: "))
        elif isinstance(result, Prediction):
            record = build_record(name, list(result.top))
        else:
            record = {"image": name, **result}
        entries.append({"index": index, **record})
    return JSONResponse({"results": entries}, 422 if all("error" in entry for entry in entries) else 200)


def build_app(predictor: Predictor, limits: Limits, token: str | None = None) -> FastAPI:
    """Build the ASGI application of an open predictor, which it has for itself.

    The token is required by all routes but /health and those that describe the routes.
    """
    server = ImageServer(predictor, limits, token)
    app = FastAPI(title="fastvit", version=__version__)
    app.add_middleware(lambda inner: partial(server.measure, inner))  # type: ignore[arg-type]
    guarded: dict[str, Any] = {"dependencies": [Depends(server.check_token)]}
    images: dict[str, Any] = {**guarded, "openapi_extra": BODY}
    Images = Annotated[Uploads, Depends(server.accept)]

    @app.post("/classify", **images)
    async def classify(uploads: Images) -> Response:
        """Return the most probable classes of each image, or its error."""
        images = [content for _, content in uploads]
        return build_answer(uploads, await run_sync(predictor, images, limiter=server.callers))

    @app.post("/embed", **images)
    async def embed(uploads: Images) -> Response:
        """Return the features of each image that the model classifies, or its error."""
        return await run_sync(server.embed, uploads, limiter=server.single)

    @app.post("/attention", **images)
    async def attention(uploads: Images, view: Literal["overlay", "sheet", "map"] = "overlay") -> Response:
        """Return the attention of the class token: a PNG of the last layer, of all layers, or the last layer's map."""
        return await run_sync(server.draw_attention, uploads, view, limiter=server.single)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Return whether requests are accepted: "ready", or with status 503 "busy" or "ended"."""
        status = "ready" if server.num_waiting < limits.queue else "busy"
        status = status if predictor._batcher.is_alive else "ended"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", **guarded)
    async def metrics() -> Response:
        """Return the metrics for Prometheus: requests by status, their seconds, length of the queue, batch sizes."""
        text = prometheus_client.generate_latest(server.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, where `timeout_keep_alive` also limits the time until a request, or an answer, has arrived.

    uvicorn waits without limit for the rest of headers, for that of a body that it has answered, and for slow readers.
    """

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.start_timer()

    def on_response_complete(self) -> None:
        self.start_timer()  # first: the next request may have been received already
        super().on_response_complete()

    def start_timer(self) -> None:
        """Abort the connection if it has no other request in time."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(self.timeout_keep_alive, self.abort_after, self.cycle)

    def abort_after(self, cycle: Any) -> None:
        if self.cycle is cycle:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        self.unread.cancel()
        super().resume_writing()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a connection whose client has sent its request and closed its half, for the answer."""
        is_waiting = self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete
        if is_waiting:
            self.cycle.keep_alive = False
        return is_waiting


def listen(host: str, port: int) -> socket.socket:
    """Open a socket; port 0 is any free one. Raises InputError if the address is not available."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"--host, --port: cannot listen on {host}:{port} ({error})") from None


def build_server(predictor: Predictor, limits: Limits, token: str | None = None) -> uvicorn.Server:
    """Build the server, and set Pillow's limit of pixels. SIGINT or SIGTERM lets it answer what it has accepted."""
    Image.MAX_IMAGE_PIXELS = limits.max_megapixels * 10**6 // 2  # Pillow raises at twice this number, and warns at it
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return uvicorn.Server(uvicorn.Config(
        build_app(predictor, limits, token), http=TimedProtocol, ws="none", lifespan="off", log_level="warning",
        access_log=False, server_header=False, timeout_keep_alive=limits.timeout,
        limit_concurrency=CONNECTIONS_PER_PLACE * limits.queue,
    ))  # fmt: skip
