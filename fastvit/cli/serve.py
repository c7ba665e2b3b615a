"""`fastvit serve`: serve a model over HTTP."""

import dataclasses
import os
import re
from pathlib import Path

from fastvit.cli.parsers import add_prediction_arguments, build_model_parser, check_counts
from fastvit.errors import InputError
from fastvit.serve.limits import Limits
from fastvit.train.arguments import get_flag

TOKEN_VARIABLE = "FASTVIT_TOKEN"


def main(argv: list[str]) -> None:
    parser = build_model_parser("serve")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 admits other machines")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on; 0: any free one")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=f"token of the clients [${TOKEN_VARIABLE}]")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of classes to return")
    add_prediction_arguments(parser)
    limits = dataclasses.fields(Limits)
    for field in limits:
        parser.add_argument(get_flag(field.name), type=int, default=field.default, metavar="N", **field.metadata)
    options = parser.parse_args(argv)
    check_counts(options, "top", "batch_size", *(field.name for field in limits))
    if not 0 <= options.port < 2**16:
        raise InputError(f"--port: expected 0 to 65535, got {options.port}")
    token = read_token(options.token_file)
    try:
        from fastvit.serve.server import build_server, listen
    except ImportError as error:
        raise InputError(f'serve: expected {error.name} to be installed: pip install "fastvit[serve]"') from None
    from fastvit.serve.predictor import Predictor

    settings = {"max_batch": options.batch_size, "top_k": options.top, "flip": options.flip, "runtime": options.runtime}
    with (
        listen(options.host, options.port) as listener,
        Predictor(options.model, options.device, **settings) as predictor,
    ):
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{options.model}: {url}, described at {url}/docs  (Ctrl-C ends it)", flush=True)
        server = build_server(predictor, Limits(*(getattr(options, field.name) for field in limits)), token)
        server.run(sockets=[listener])
        if server.should_exit:  # by Ctrl-C; uvicorn raises the signal again, which asyncio does not always pass on
            raise KeyboardInterrupt


def read_token(path: Path | None) -> str | None:
    """Read the token that clients must send, if any: from a file, otherwise from the environment.

    Raises:
        InputError: the file cannot be read, or the token is empty or cannot be sent in a header.
    """
    name = TOKEN_VARIABLE if path is None else f"--token-file: {path}"
    try:
        token = os.environ.get(TOKEN_VARIABLE) if path is None else path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read ({error})") from None
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise InputError(f"{name}: expected one word of ASCII characters")
    return token
