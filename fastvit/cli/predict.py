"""`fastvit predict`: classify images."""

from __future__ import annotations

import json
import sys

from fastvit.cli.parsers import add_prediction_arguments, build_model_parser, check_counts
from fastvit.errors import InputError, escape_unprintable


def main(argv: list[str]) -> int:
    """Print the most probable classes of each image; returns exit code 2 if an image could not be read."""
    parser = build_model_parser("predict")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of classes to print")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line")
    add_prediction_arguments(parser)
    options = parser.parse_args(argv)
    check_counts(options, "top", "batch_size")

    from fastvit.serve.predictor import Predictor

    code = 0
    settings = {"max_batch": options.batch_size, "top_k": options.top, "flip": options.flip}
    with Predictor(options.model, options.device, **settings) as predictor:
        for path, result in zip(options.images, predictor.stream(options.images), strict=True):
            if isinstance(result, InputError):
                print(f"error: {escape_unprintable(str(result))}", file=sys.stderr)
                code = 2
            elif options.json:
                classes = [{"label": label, "probability": round(score, 6)} for label, score in result.top]
                print(json.dumps({"image": path, "classes": classes}, ensure_ascii=not path.isprintable()))
            else:
                print(escape_unprintable(path))
                for label, score in result.top:
                    print(f"  {score:7.2%}  {escape_unprintable(label)}")
    return code
