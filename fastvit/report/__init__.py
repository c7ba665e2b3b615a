"""What a run leaves for a person: metrics, figures, charts, the run log, pages."""
