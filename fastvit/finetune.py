"""`python -m fastvit.finetune` is `fastvit finetune`, in the form that torchrun and accelerate launch."""

import sys

from fastvit.train.finetune import main

if __name__ == "__main__":
    sys.exit(main())
