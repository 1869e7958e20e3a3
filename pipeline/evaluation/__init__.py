"""Compare generated with real images.

``extractors`` computes features of images, and ``metrics`` the scores of features that
``catalogue`` lists. ``scorer`` scores one set of images, and ``run_scores`` the checkpoints of a
run.
"""
