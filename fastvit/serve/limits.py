"""The limits of `fastvit serve`, which are options of its command."""

from dataclasses import dataclass, field


def limit(default: int, help: str) -> int:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    queue: int = limit(256, "accepted requests without an answer; further ones are answered 429")
    max_mb: int = limit(32, "size of a request in MiB")
    max_files: int = limit(32, "images per request")
    max_megapixels: int = limit(64, "size of an image in millions of pixels")
    timeout: int = limit(30, "seconds in which a request must arrive")
