"""The limits of `fastvit serve`, which are options of its command."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    queue: int = field(default=256, metadata={"help": "accepted requests without an answer; others are answered 429"})
    max_mb: int = field(default=32, metadata={"help": "size of a request in MiB"})
    max_files: int = field(default=32, metadata={"help": "images per request"})
    max_megapixels: int = field(default=64, metadata={"help": "size of an image in millions of pixels"})
    timeout: int = field(default=30, metadata={"help": "seconds in which a request must arrive"})
