"""Models that are not ours, with our operations in their blocks: `fastvit.optimize` and `fastvit.restore`.

    block.py      what a ViT block is, whoever wrote it, and our forward of it
    swap.py       finding blocks in a model, giving them our forward, and giving them their own back
    the others    one family each: where its blocks keep what `block.Block` asks for

To add a family, write a file with `ADAPTERS`, name it in `swap.FAMILIES`, and add a small config of it to
tests/test_optimize.py (docs/optimize.md).
"""
