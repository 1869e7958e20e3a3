"""Score images against real ones: extractors, metrics, protocols and the scores of a run."""
