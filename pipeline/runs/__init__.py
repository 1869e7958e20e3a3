"""Write what a run leaves on disk and in W&B: folder, checkpoints, metrics, scores; preflight."""
