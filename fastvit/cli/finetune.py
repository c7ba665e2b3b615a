"""`fastvit finetune`: train a ViT to classify images."""

from fastvit.train.options import parse_options


def main(argv: list[str]) -> None:
    options = parse_options(argv)
    from fastvit.train.finetune import run  # imports PyTorch and transformers

    run(options)
