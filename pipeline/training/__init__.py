"""Train G and D: the two updates, the losses, what steadies them, and the run around them."""
