"""The one list of what transformers' own ViT passes and ours does not. Anything else fails the run."""

# Test -> ("fails" or "skipped", why). One that "fails" must go on failing: passing after all fails the run too.
DIFFERENCES = {
    "test_model_weights_reload_no_missing_tied_weights": (
        "fails",
        "loads a checkpoint that holds none of the model's tensors and expects a warning; to us that is an error",
    ),
    "test_reverse_loading_mapping": (
        "skipped",
        "our tensors have the hub's names in memory too, so nothing is converted on loading and saving; that the names"
        " of transformers 5 are understood is tested in tests/test_drop_in.py",
    ),
    "test_can_load_from_already_mapped_keys": ("skipped", "as test_reverse_loading_mapping"),
}
