"""`fastvit convert`: convert a checkpoint to another format."""

from fastvit.cli.parsers import build_parser, check_counts


def main(argv: list[str]) -> None:
    parser = build_parser("convert")
    parser.add_argument("source", metavar="SOURCE", help="folder or file to read, in any of the formats")
    parser.add_argument(
        "dest", metavar="DEST", help="folder (Hugging Face), .safetensors (timm) or .npz (Google) to write"
    )
    parser.add_argument("--to", choices=("hf", "timm", "npz"), help="format to write [from the ending of DEST]")
    parser.add_argument(
        "--heads",
        type=int,
        metavar="N",
        help="attention heads, if the source does not state them [those of timm's model of this hidden size]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DEST")
    options = parser.parse_args(argv)
    check_counts(options, "heads")
    from fastvit.checkpoints.convert import convert

    written = convert(options.source, options.dest, to=options.to, num_heads=options.heads, overwrite=options.overwrite)
    print(f"written: {written}")
