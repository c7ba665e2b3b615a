"""fastvit's operations in the blocks of other libraries' models: `fastvit.optimize` and `fastvit.restore`.

    swap.py       finds the blocks of a model, attaches the fused forward and detaches it
    backbones.py  classifiers of all families, for fine-tuning and serving
    the others    one family each: how its blocks map to `fastvit.ops.block.Block`

docs/optimize.md describes how to add a family.
"""
