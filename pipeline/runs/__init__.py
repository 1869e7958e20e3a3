"""Keep what a run leaves behind: its folder, checkpoints, scores, metrics and dashboard."""
