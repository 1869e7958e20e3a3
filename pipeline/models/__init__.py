"""Build G and D, draw noise, and turn noise into images."""
