"""`python -m fastvit` is the `fastvit` command."""

import sys

from fastvit.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
