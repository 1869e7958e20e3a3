"""Repeat the experiments of Goodfellow et al. 2014 and Radford et al. 2016."""
