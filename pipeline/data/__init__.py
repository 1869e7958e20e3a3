"""Turn images into shards and shards into batches: which sample, where it lies, its pixels."""
