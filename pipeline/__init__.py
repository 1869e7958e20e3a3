"""Distributed DCGAN training: images to shards, shards to checkpoints, checkpoints to scores."""
