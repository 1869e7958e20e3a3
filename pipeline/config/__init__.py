"""Describe a run: the sections and keys, how they are read, and which combinations are refused."""
