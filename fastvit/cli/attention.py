"""`fastvit attention`: draw the attention of the class token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastvit.cli.parsers import add_source_arguments, build_model_parser, find_sources
from fastvit.errors import InputError, escape_unprintable


def main(argv: list[str]) -> int:
    """Draw the attention of each image; returns exit code 2 if an image could not be read."""
    parser = build_model_parser(
        "attention", description="Draw the attention of the class token: the last block, all blocks, and the rollout."
    )
    add_source_arguments(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="image to write, or folder for several [attention.png]"
    )
    options = parser.parse_args(argv)
    sources = find_sources(options)
    targets = choose_targets([name for name, _ in sources], options.output)

    from fastvit.data.images import to_image
    from fastvit.report import figures
    from fastvit.serve.attention import classify_with_attention, describe_prediction, preprocess_image
    from fastvit.serve.predictor import Predictor

    code = 0
    with Predictor(options.model, options.device, runtime="torch") as predictor:
        for (name, source), target in zip(sources, targets, strict=True):
            try:
                image = to_image(source, name, predictor.preprocessor.channels)
            except InputError as error:
                if len(sources) == 1:
                    raise
                print(f"error: {escape_unprintable(str(error))}", file=sys.stderr)
                code = 2
                continue
            result = classify_with_attention(predictor.model, preprocess_image(predictor, image))
            title = describe_prediction(result.probabilities, predictor.class_names, predictor.task)
            target.parent.mkdir(exist_ok=True)
            figures.save_image(figures.draw_attention_sheet(image.convert("RGB"), *result[1:], title=title), target)
            print(escape_unprintable(f"{name}: {title}"))
            print(f"written: {escape_unprintable(str(target))}")
    return code


def choose_targets(names: Sequence[str], output: Path | None) -> list[Path]:
    """Choose the file of each image: `output`, or for several images a file of the image's name in that folder.

    Raises:
        InputError: several images, and `output` is a file or has the name of one.
    """
    if len(names) == 1 and not (output is not None and output.is_dir()):
        return [output or Path("attention.png")]
    folder = output or Path("attention")
    if folder.is_file() or (folder.suffix and not folder.is_dir()):
        raise InputError(f"--output: expected a folder for {len(names)} images, got {folder}")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"--output: no such folder: {folder.parent}")
    targets: dict[Path, None] = {}
    for name in names:
        stem = Path(name).stem if Path(name).suffix else name.replace("/", "-")
        target, number = folder / f"{stem}.png", 2
        while target in targets:
            target, number = folder / f"{stem}-{number}.png", number + 1
        targets[target] = None
    return list(targets)
