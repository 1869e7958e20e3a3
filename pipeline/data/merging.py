"""Merge the records of packed shards into the index of their set, some shards at a time."""

from __future__ import annotations

from collections import Counter

from pipeline.data.index_writer import index_writer
from pipeline.data.packing import AT_ONCE, Job, finished
from pipeline.data.preview import PREVIEW_NAME, write_preview
from pipeline.data.shards import INDEX_NAME, Index, read_index
from pipeline.data.skipped import SKIPPED_NAME, SKIPPED_SUM, account, write_list
from pipeline.runtime.errors import DataError
from pipeline.runtime.text import printable

FILES = "source_files"
"""Key of the index: the record of the files of each shard."""


class LostShards(DataError):
    """Shards of the set are not packed, or not as their records say."""


def merge(job: Job, strict: bool) -> Index:
    """Write the list of skipped images, the index and the preview of a set that is packed.

    The bytes of the shards are not read again: whoever packed them has compared them.

    Args:
        job: the set; the caller holds its folder.
        strict: fail unless every file of the source is an image that is used as it is stored.

    Raises:
        LostShards: some are missing; their records were set aside.
        DataError: no image can be read, or ``strict`` forbids what was done.
        OSError: the folder cannot be read or written.
    """
    skipped: list[tuple[str, str]] = []
    done: Counter[str] = Counter()
    files = []
    images, side = len(job.source.names), job.square.size
    with index_writer(job.out / INDEX_NAME) as writer:
        for start in range(0, job.num_shards, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, job.num_shards))
            packed = finished(job, numbers, whole=False)
            if lost := len(numbers) - len(packed):
                raise LostShards(
                    f"--out ({job.out}): {lost} shards were changed while others were packed. Run "
                    "the same command again: it packs them again."
                )
            for number in numbers:
                one = packed[number]
                writer.add(one.shard, one.table, one.field)
                skipped += one.skipped
                done.update(one.done)
                files.append(one.files)
        skipped.sort()
        listed = write_list(job.out, skipped)
        if len(skipped) == images:
            name, why = skipped[0]
            raise DataError(
                f"SOURCE ({job.source.location}): none of its {images} images can be read, e.g. "
                f"{printable(name)}: {printable(why)}. All are listed in {job.out / SKIPPED_NAME}."
            )
        counts = {
            **{"skipped": len(skipped), SKIPPED_SUM: listed, "done": dict(done)},
            **{"left_out": job.source.left_out, "said": job.source.said},
        }
        account(counts, images, job.out, strict)
        made_by = job.describe() | counts | {FILES: files}
        writer.finish(job.out, (side, side, job.square.channels), made_by)
    index = read_index(str(job.out))
    write_preview(index, job.out / PREVIEW_NAME)
    return index
