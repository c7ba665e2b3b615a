"""`fastvit demo`: serve a page on this machine that classifies images."""

import os
import tempfile

from fastvit.cli.parsers import build_model_parser
from fastvit.errors import InputError


def main(argv: list[str]) -> None:
    parser = build_model_parser("demo")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0 admits other machines"
    )
    parser.add_argument("--port", type=int, metavar="N", help="port to listen on [the first free one from 7860]")
    options = parser.parse_args(argv)
    if options.port is not None and not 0 < options.port < 2**16:
        raise InputError(f"--port: expected 1 to 65535, got {options.port}")
    from fastvit.serve.demo import build_demo_page, serve_page

    with tempfile.TemporaryDirectory(prefix="fastvit-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # otherwise images stay where every user of the machine can read them
        page = build_demo_page(options.model, options.device)
        url = serve_page(page, options.host, options.port)
        print(f"{options.model}: {url}  (Ctrl-C ends it)", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
