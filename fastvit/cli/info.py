"""`fastvit info`: devices, versions and the backend of each operation."""

from fastvit.cli.parsers import build_parser


def main(argv: list[str]) -> None:
    build_parser("info").parse_args(argv)
    from fastvit.report.info import build_report

    print(build_report())
