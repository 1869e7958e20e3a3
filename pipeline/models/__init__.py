"""G and D, their random inputs, and the images that G makes of them."""
