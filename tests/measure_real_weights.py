"""Print how much accuracy each precision costs on trained weights and photographs, as a table for docs/features.md.

FASTVIT_BEANS_DIR=... python tests/measure_real_weights.py [--train 100] [--images N] [--precisions bfloat16 fp8 ...]

The probe and the neighbours are those of float32 features of training images; each precision computes the features of
the validation images.
"""

import argparse

import torch
from trained import (
    compute_features,
    find_skip_reason,
    fit_probe,
    load_vit,
    predict_by_neighbours,
    predict_by_probe,
    read_photographs,
    relative_error,
    set_precision,
)

PRECISIONS = ("float32", "bfloat16", "float16", "fp8", "int8")
COLUMNS = ("precision", "class token", "mean patch token", "worst image", "probe", "changed", "5-NN", "changed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=100, help="training images per class")
    parser.add_argument("--images", type=int, help="validation images per class; all by default")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    options = parser.parse_args()
    if reason := find_skip_reason():
        parser.exit(1, f"{reason}\n")
    train, train_labels = read_photographs("train", options.train)
    images, labels = read_photographs("validation", options.images)
    known = compute_features(load_vit(), train)
    expected = compute_features(load_vit(), images)
    step = max(1, len(images) // 20)
    exact = compute_features(load_vit().double(), images[::step])
    print(f"{len(train)} training images, {len(images)} validation images, torch {torch.__version__}")
    print(f"float32 against float64: {relative_error(expected[::step], exact):.1e}\n")
    print("|", " | ".join(COLUMNS), "|\n|---" + "|---:" * (len(COLUMNS) - 1) + "|")
    predictors = (
        lambda features: predict_by_probe(fit_probe(known, train_labels), features),
        lambda features: predict_by_neighbours(known, train_labels, features),
    )
    for precision in options.precisions:
        features = expected
        if precision != "float32":
            features = compute_features(set_precision(load_vit(), precision), images)
        errors = [relative_error(*parts) for parts in zip(features.chunk(2, -1), expected.chunk(2, -1), strict=True)]
        worst = ((features - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
        cells = [precision, *(f"{error:.1e}" for error in errors), f"{worst:.1e}"]
        for predict in predictors:
            found = predict(features)
            cells += [f"{(found == labels).double().mean():.1%}", f"{(found != predict(expected)).sum()}"]
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
