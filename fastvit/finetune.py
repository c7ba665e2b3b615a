"""`python -m fastvit.train.finetune`, as torchrun and accelerate start it, is `fastvit finetune`."""

import sys

from fastvit.train.finetune import main

if __name__ == "__main__":
    sys.exit(main())
