"""Print what pip must install to run the tests with the oldest PyTorch, Triton and transformers that are supported.

Those three at the lower bound that pyproject.toml gives them, everything else as new as it may be: one line, by which
`make setup-oldest` knows an environment that it need not make again.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

PINNED = ("torch", "triton", "transformers")
project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]


def of(requirements: list[str]) -> Iterator[str]:
    """Requirements without spaces and markers; "fastvit[extra,...]" stands for those of the extras."""
    for requirement in requirements:
        name, extras, versions = re.match(r"([\w-]+)(?:\[(.*)\])?([^;]*)", requirement.replace(" ", "")).groups()
        if name == project["name"]:
            for extra in extras.split(","):
                yield from of(project["optional-dependencies"][extra])
        elif name in PINNED:
            yield f"{name}=={re.search(r'>=([0-9.]+)', versions)[1]}"
        else:
            yield requirement.partition(";")[0].replace(" ", "")


print(*of([*project["dependencies"], f"{project['name']}[test]"]))
