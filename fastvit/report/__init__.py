"""Reports on runs and models: metrics, figures, charts, the run log and HTML pages."""
