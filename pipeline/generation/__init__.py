"""Make images from a snapshot: sets of any size, walks, figures and exports."""
