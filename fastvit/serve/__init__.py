"""Thread-safe inference for classifiers: preprocessing, dynamic batching, execution, and the demo page."""
