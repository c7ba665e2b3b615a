"""`fastvit attention`: draw the attention of the class token."""

from pathlib import Path

from fastvit.cli.parsers import build_model_parser
from fastvit.errors import escape_unprintable


def main(argv: list[str]) -> None:
    parser = build_model_parser(
        "attention", description="Draw the attention of the class token: per block, and rolled out through all blocks."
    )
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("-o", "--output", default="attention.png", metavar="FILE", help="image to write")
    options = parser.parse_args(argv)

    from fastvit.data.images import decode_image
    from fastvit.report import figures
    from fastvit.serve.attention import classify_with_attention, describe_prediction, preprocess_image
    from fastvit.serve.predictor import Predictor

    image = decode_image(options.image)
    with Predictor(options.model, options.device) as predictor:
        attended = classify_with_attention(predictor.model, preprocess_image(predictor, image))
    predicted = describe_prediction(attended.probabilities, predictor.class_names)
    sheet = figures.draw_attention_sheet(image, attended.maps, attended.grid, predicted)
    figures.save_image(sheet, Path(options.output))
    print(f"{escape_unprintable(predicted)}\nwritten: {options.output}")
