"""Classification for many threads: preprocessing, batching, the model, the demo page."""
