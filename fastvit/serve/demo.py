"""`fastvit demo MODEL`: a local web page that shows the classes and the attention of an uploaded image.

It requires Gradio, an optional dependency. By default it listens on the loopback interface only. It needs no network
(system fonts are used) and telemetry is disabled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from fastvit.data.images import decode_image
from fastvit.errors import InputError
from fastvit.report import figures
from fastvit.report.html import shorten
from fastvit.serve.attention import classify_with_attention, describe_prediction, preprocess_image
from fastvit.serve.predictor import Predictor

MAX_CLASSES = 5
MAP_SIDE = 512  # pixels of the attention map
IMAGE_HEIGHT = 380  # height in pixels of both images on the page

STYLE = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important }
footer { display: none !important }
"""


def build_demo_page(model: str, device: str | None = None) -> Any:
    """Build the page as Gradio Blocks, with the endpoint `/predict`. It is not yet served."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at the import of gradio and again later
    try:
        import gradio
    except ImportError:
        raise InputError('demo: expected Gradio to be installed: pip install "fastvit[demo]"') from None

    # Closed at once: images are classified one by one, without its threads.
    with Predictor(model, device, runtime="torch") as predictor:
        names = [shorten(name) for name in predictor.class_names]

    def classify(path: str | None) -> tuple[dict[str, float] | str | None, Image.Image | None]:
        if path is None:  # the image was removed
            return None, None
        try:
            image = decode_image(path, "The file", predictor.preprocessor.channels)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        result = classify_with_attention(predictor.model, preprocess_image(predictor, image))
        shown = ImageOps.contain(image.convert("RGB"), (MAP_SIDE, MAP_SIDE))
        attention_map = figures.overlay_last_layer(shown, *result[1:])
        if predictor.task.kind == "regression":
            return describe_prediction(result.probabilities, names, predictor.task, len(names)), attention_map
        return dict(zip(names, result.probabilities.tolist(), strict=True)), attention_map

    def get_path(payload: Any) -> str | None:
        """Replaces the decoding of Gradio, whose error messages are less specific."""
        return None if payload is None else payload.path

    with gradio.Blocks(title=f"{model} · fastvit", analytics_enabled=False) as page:
        gradio.Markdown(
            f"# {Path(model).name or model}\n{len(names)} {predictor.task.noun}."
            " Images stay on the machine that serves this page."
        )
        with gradio.Row():
            image = gradio.Image(label="Image", sources=["upload", "clipboard"], height=IMAGE_HEIGHT)
            image.preprocess = get_path  # type: ignore[method-assign]
            with gradio.Column():
                classes = gradio.Label(
                    num_top_classes=min(MAX_CLASSES, len(names)), label=predictor.task.noun.capitalize()
                )
                attention = gradio.Image(
                    label="Attention of the class token (last layer)",
                    interactive=False,
                    height=IMAGE_HEIGHT,
                    buttons=["download", "fullscreen"],  # without "share", which uploads the image
                )
        image.change(classify, image, [classes, attention], api_name="predict")
    return page


def serve_page(page: Any, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start to serve the page without blocking.

    Returns:
        The URL.

    Raises:
        InputError: the address or port is not available.
    """
    import gradio

    system = ["system-ui", "sans-serif"]
    theme = gradio.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=system, font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            max_file_size="64mb",
            inbrowser=False,
            prevent_thread_lock=True,
            theme=theme,
            css=STYLE,
        )
    except OSError as error:
        where = host if port is None else f"{host}:{port}"
        raise InputError(f"--host, --port: cannot listen on {where} ({error})") from None
    return url
