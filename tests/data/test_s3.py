"""Shards in an S3 store, served by moto on this machine, through a cache smaller than the set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import label_of, pixels_of

from pipeline.config.schema import Config, DataConfig
from pipeline.data.loader import Loader, make_order
from pipeline.data.shards import Index, read_index

SHARDS = 12
KEYS = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "password of a test"}


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The URL of an S3 server."""
    code = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '0'])"
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | KEYS,
    )
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if found := re.search(r"Running on (http://\S+)", line):
                break
        else:
            pytest.fail(f"moto ended: {server.wait()}")
        yield found[1]
    finally:
        server.kill()
        server.communicate()  # which closes its pipe


@pytest.fixture
def bucket(
    store: str, make_shards: Callable[..., Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URL of a set of 12 shards of 40 images."""
    import boto3

    for name, value in (
        KEYS | {"AWS_ENDPOINT_URL": store, "AWS_DEFAULT_REGION": "us-east-1"}
    ).items():
        monkeypatch.setenv(name, value)
    local = make_shards(tmp_path / "set", [40] * SHARDS, (32, 32, 3))
    client = boto3.client("s3", endpoint_url=store)
    client.create_bucket(Bucket="images")
    for path in sorted(Path(local.location).iterdir()):
        client.upload_file(str(path), "images", f"set/{path.name}")
    return "s3://images/set"


def test_two_epochs_through_a_third_of_the_set(bucket: str, tmp_path: Path) -> None:
    """Each image comes twice, in the order of the position, and the cache stays below its limit."""
    index = read_index(bucket)
    whole = sum(shard.filesize for shard in index.shards)
    limit, cache = whole / 3, tmp_path / "cache"
    config = Config(
        data=DataConfig(
            shards=bucket,
            batch_size=24,
            workers=2,
            block=40,
            window=80,
            cache_dir=str(cache),
            cache_gib=limit / 2**30,
        )
    )
    order = make_order(config, index)
    loader = Loader(config, index, order)
    most = 0
    with closing(loader.batches(0)) as batches:
        for k in range(2 * index.num_samples // 24):
            batch = next(batches)
            ids = order.ids(np.arange(24 * k, 24 * k + 24))
            wanted = sorted(
                (pixels_of(i, (32, 32, 3)).tobytes(), label_of(i)) for i in ids.tolist()
            )
            rows = zip(batch.images.numpy(), batch.labels.tolist(), strict=True)
            assert sorted((pixels.tobytes(), label) for pixels, label in rows) == wanted
            most = max(most, loader.cache.used())
    assert 0 < most <= limit + whole / SHARDS  # the shard that is being fetched
