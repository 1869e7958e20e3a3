"""Every source that people start from, written by its own tool: images, labels, pixels."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import mds_sets
import numpy as np
import pytest
from PIL import Image
from test_pictures import picture, stored
from test_sources import CHOICE, images, jpg, prepare, seeds, tar_of

from pipeline.data.labels import NO_LABEL
from pipeline.data.pictures import DecodeError
from pipeline.data.source import Choice, Source
from pipeline.data.sources import find, reader
from pipeline.data.squares import Square
from pipeline.runtime.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 32, 32, 3), np.uint8)
LABELS = [3, 1, 2, 0, 1, 3]


def same(source: Source, pixels: Any = PIXELS, labels: Any = LABELS) -> None:
    """Each image is read exactly, with its label."""
    read = reader(source, Square(32, 3))
    assert np.array_equal(np.stack([read(row)[0] for row in range(len(source.names))]), pixels)
    assert source.labels.tolist() == list(labels)
    assert len(set(source.names)) == len(source.names)


# -- CIFAR --------------------------------------------------------------------------------------


def cifar_bytes(pixels: Any, labels: list[int], key: bytes = b"labels", protocol: int = 2) -> bytes:
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    names = [b"a.png"] * len(labels)
    return pickle.dumps(
        {b"batch_label": b"x", key: labels, b"data": rows, b"filenames": names}, protocol
    )


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_10_is_read_without_unpickling(tmp_path: Path, packed: bool, protocol: int) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for k in range(2):
        half = slice(3 * k, 3 * k + 3)
        content = cifar_bytes(PIXELS[half], LABELS[half], protocol=protocol)
        (folder / f"data_batch_{k + 1}").write_bytes(content)
    (folder / "test_batch").write_bytes(cifar_bytes(PIXELS[:1], [0]))
    names = ["plane", "car", "bird", "cat"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names, "num_vis": 3072}, 2))
    source = folder
    if packed:
        source = tmp_path / "cifar-10-python.tar.gz"
        subprocess.run(["tar", "-czf", source, "-C", tmp_path, folder.name], check=True)
    same(find(str(source), CHOICE))
    assert find(str(source), CHOICE).classes == tuple(names)
    assert len(find(str(source), Choice(split="test")).names) == 1
    if not packed:
        same(find(str(tmp_path), CHOICE))  # torchvision's root


def test_cifar_100_gives_the_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = PIXELS.transpose(0, 3, 1, 2).reshape(6, -1)
    content = {"coarse_labels": [9] * 6, "fine_labels": LABELS, "data": rows}
    (folder / "train").write_bytes(pickle.dumps(content, 2))
    same(find(str(folder), CHOICE))


@pytest.mark.parametrize(("name", "heads"), [("cifar-10-batches-bin", 1), ("cifar-100-binary", 2)])
def test_the_binary_version_is_read(tmp_path: Path, name: str, heads: int) -> None:
    (tmp_path / name).mkdir()
    rows = PIXELS.transpose(0, 3, 1, 2).reshape(6, -1)
    columns = np.array([LABELS] * heads, np.uint8).T
    file = "data_batch_1.bin" if heads == 1 else "train.bin"
    (tmp_path / name / file).write_bytes(np.hstack([columns, rows]).tobytes())
    same(find(str(tmp_path / name), CHOICE))


def test_a_pickle_that_runs_code_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/harm",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = PIXELS.transpose(0, 3, 1, 2).reshape(6, -1)
    content = {"evil": Evil(), "labels": LABELS, "data": rows}
    (folder / "data_batch_1").write_bytes(pickle.dumps(content, 2))
    same(find(str(folder), CHOICE))
    (folder / "data_batch_1").write_bytes(pickle.dumps(content, 2)[:-20_000])
    with pytest.raises(DataError, match=r"data_batch_1: damaged: .* Get the file again"):
        find(str(folder), CHOICE)
    assert not (tmp_path / "harm").exists()


# -- IDX ----------------------------------------------------------------------------------------


def idx(path: Path, array: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(head + array.astype(np.uint8).tobytes())


def test_the_layouts_of_torchvision_and_emnist(tmp_path: Path) -> None:
    gray = PIXELS[..., 0]
    shown = np.repeat(gray[..., None], 3, -1)
    idx(tmp_path / "tv" / "MNIST" / "raw" / "train-images-idx3-ubyte", gray)
    idx(tmp_path / "tv" / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.array(LABELS))
    same(find(str(tmp_path / "tv"), CHOICE), shown)
    for name in ("letters", "balanced"):
        for part in ("train", "test"):
            stem = tmp_path / "emnist" / "gzip" / f"emnist-{name}-{part}"
            idx(Path(f"{stem}-images-idx3-ubyte.gz"), gray.transpose(0, 2, 1))
            idx(Path(f"{stem}-labels-idx1-ubyte.gz"), np.array(LABELS))
    with pytest.raises(
        DataError, match=r"several sets .* --image-field with one of balanced, letters"
    ):
        find(str(tmp_path / "emnist"), CHOICE)
    source = find(str(tmp_path / "emnist"), Choice(image_field="letters", split="test"))
    same(source, shown)
    assert "turned upright" in source.said[0]


def test_idx_images_without_labels(tmp_path: Path) -> None:
    idx(tmp_path / "train-images-idx3-ubyte", PIXELS[..., 0])
    source = find(str(tmp_path), CHOICE)
    assert set(source.labels.tolist()) == {NO_LABEL}
    assert len(source.names) == 6


# -- arrays -------------------------------------------------------------------------------------


def test_npy_and_npz_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    same(find(str(tmp_path / "a.npy"), CHOICE), labels=[NO_LABEL] * 6)
    np.save(tmp_path / "first.npy", PIXELS.transpose(0, 3, 1, 2))
    source = find(str(tmp_path / "first.npy"), CHOICE)
    same(source, labels=[NO_LABEL] * 6)
    assert "channels first" in source.said[0]
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=np.array(LABELS))
    same(find(str(tmp_path / "a.npz"), CHOICE))
    np.savez_compressed(tmp_path / "keras.npz", x_train=PIXELS, y_train=LABELS, x_test=PIXELS[:2])
    same(find(str(tmp_path / "keras.npz"), Choice(split="train")))
    with pytest.raises(DataError, match=r"x_train \(6, 32, 32, 3\) uint8.* --split train"):
        find(str(tmp_path / "keras.npz"), CHOICE)
    one_hot = np.eye(4, dtype=int)[LABELS]
    np.savez(tmp_path / "hot.npz", arr_0=PIXELS, y=one_hot)
    same(find(str(tmp_path / "hot.npz"), CHOICE))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 8, 8, 3), np.float32), np.zeros((4, 8), np.uint8), np.array([{}], object)],
    ids=["floats", "no images", "objects"],
)
def test_other_arrays_are_refused(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", array)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError, match=rf"SOURCE \(.*{name}\)"):
            find(str(tmp_path / name), CHOICE)


def test_a_folder_of_npy_images(tmp_path: Path) -> None:
    for k, pixels in enumerate(PIXELS):
        folder = tmp_path / "ab"[k % 2]
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{k}.npy", pixels)
    source = find(str(tmp_path), CHOICE)
    same(source, PIXELS[[0, 2, 4, 1, 3, 5]], [0, 0, 0, 1, 1, 1])


def test_hdf5(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("train/images", data=PIXELS, chunks=(2, 32, 32, 3), compression="gzip")
        file["train/label"] = LABELS
    choice = Choice(label_field="train/label", download=False)
    same(find(str(tmp_path / "a.h5"), choice))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["images"] = h5py.ExternalLink("a.h5", "/train/images")
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        (tmp_path / "raw").write_bytes(PIXELS.tobytes())
        file.create_dataset(
            "x", PIXELS.shape, np.uint8, external=[(str(tmp_path / "raw"), 0, 1 << 20)]
        )
    for name in ("link.h5", "outside.h5"):
        with pytest.raises(DataError, match="other file"):
            find(str(tmp_path / name), CHOICE)
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="cannot be read"):
        find(str(tmp_path / "bad.h5"), CHOICE)


# -- stores and tables --------------------------------------------------------------------------


def test_lsun(tmp_path: Path) -> None:
    import lmdb

    folder = tmp_path / "church_outdoor_train_lmdb"
    with lmdb.open(str(folder), map_size=1 << 24) as store, store.begin(write=True) as transaction:
        for k in range(6):
            transaction.put(f"{k:040x}".encode(), stored(PIXELS[k], "WEBP", lossless=True))
    same(find(str(folder), CHOICE), labels=[NO_LABEL] * 6)
    said = prepare(folder, "--out", tmp_path / "out", "--size", 32)
    assert "6 samples in 1 shards" in said
    (folder / "data.mdb").write_bytes(b"no store" * 1000)
    with pytest.raises(DataError, match=r"data\.mdb cannot be read"):
        find(str(folder), CHOICE)


@pytest.fixture
def mds(tmp_path: Path) -> Path:
    """The folder of the sets that mosaicml-streaming wrote."""
    shutil.unpack_archive(Path(__file__).with_name("mds_sets.zip"), tmp_path / "mds")
    return tmp_path / "mds"


@pytest.mark.parametrize("name", mds_sets.SETS)
def test_mds_shards_by_mosaicml_streaming(mds: Path, name: str) -> None:
    """Each way to store an image and a label; several shards; a column that is a pickle is left."""
    choice = Choice(label_field="a_label" if name == "ndarray" else None)
    source = find(str(mds / name / "train"), choice)
    assert source.classes == (("ant", "bee", "cat") if name == "pil" else ())
    labels = [2, 0, 1] if name == "pil" else mds_sets.LABELS
    assert source.labels.tolist() == ([NO_LABEL] * 3 if name == "ndarray_fixed" else labels)
    read = reader(source, Square(8, 3))
    assert np.array_equal(np.stack([read(row)[0] for row in range(3)]), mds_sets.PIXELS)
    assert {one.partition("[")[0] for one in source.names} >= {"shard.00000.mds", "shard.00001.mds"}
    assert find(str(mds / name), choice).names == source.names  # its split "train"


def test_a_damaged_or_foreign_mds_set_is_one_message(mds: Path) -> None:
    """A cut shard, one that is missing, a path in the index, two columns of images."""
    folder = mds / "png" / "train"
    with pytest.raises(DataError, match=r"--image-field \(label\): must be one column of images"):
        find(str(folder), Choice(image_field="label"))
    with pytest.raises(DataError, match=r"--label-field \(kind\): .* it has image, label"):
        find(str(folder), Choice(label_field="kind"))
    shard, index = folder / "shard.00000.mds", folder / "index.json"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"shard.00000.mds: is damaged: it is not as index.json"):
        find(str(folder), CHOICE)
    shard.unlink()
    with pytest.raises(DataError, match=r"no such file, though index.json names it"):
        find(str(folder), CHOICE)
    (folder.parent / "shard.mds").write_bytes(content)
    index.write_text(index.read_text().replace("shard.00000.mds", "../shard.mds"))
    with pytest.raises(DataError, match=r"index.json is none of version 2 of MDS, or is damaged"):
        find(str(folder), CHOICE)


def parquet(path: Path, images: Any, **columns: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    features = {"label": {"names": ["ant", "bee", "cat", "dog"], "_type": "ClassLabel"}}
    info = json.dumps({"info": {"features": features}})
    table = pyarrow.table({"image": images, **columns}).replace_schema_metadata(
        {"huggingface": info}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def test_parquet_as_the_hub_has_it(tmp_path: Path) -> None:
    rows = [{"bytes": stored(one, "PNG"), "path": "x.png"} for one in PIXELS]
    for part in range(2):
        half = slice(3 * part, 3 * part + 3)
        parquet(tmp_path / "set" / f"train-{part}.parquet", rows[half], label=LABELS[half])
    source = find(str(tmp_path / "set"), CHOICE)
    same(source)
    assert source.classes == ("ant", "bee", "cat", "dog")
    parquet(
        tmp_path / "one.parquet",
        [stored(one, "PNG") for one in PIXELS],
        kind=LABELS,
        caption=["x"] * 6,
    )
    same(find(str(tmp_path / "one.parquet"), Choice(label_field="kind")))
    with pytest.raises(DataError, match=r"--label-field \(nothing\): .* image, kind, caption"):
        find(str(tmp_path / "one.parquet"), Choice(label_field="nothing"))
    with pytest.raises(DataError, match=r"--image-field \(caption\): is no column of images"):
        find(str(tmp_path / "one.parquet"), Choice(image_field="caption"))
    outside = [{"bytes": None, "path": "/etc/passwd"}] * 6
    parquet(tmp_path / "paths.parquet", outside, label=LABELS)
    with pytest.raises(DecodeError, match="only the path of a file"):
        reader(find(str(tmp_path / "paths.parquet"), CHOICE), Square(32, 3))(0)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        find(str(tmp_path / "bad.parquet"), CHOICE)


def test_a_wrong_name_on_the_hub_is_one_message() -> None:
    with pytest.raises(DataError, match=r"must be hf://datasets/OWNER/NAME"):
        find("hf://datasets/cifar10/a/b/c", CHOICE)


# -- tars ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz"])
def test_a_single_tar_packed_or_not(tmp_path: Path, end: str) -> None:
    folder = images(tmp_path / "set", "1.jpg", "2.jpg", "3.jpg")
    path = tmp_path / f"a{end}"
    names = sorted(one.name for one in folder.iterdir())
    subprocess.run(["tar", "-caf", path, "-C", folder, *names], check=True)
    source = find(str(path), CHOICE)
    assert seeds(source) == [0, 1, 2]
    assert source.location == str(path)


@pytest.mark.parametrize("end", [".tar.gz", ".tar.xz"])
def test_a_cut_tar_is_one_message(tmp_path: Path, end: str) -> None:
    folder = images(tmp_path / "set", "1.jpg", "2.jpg", "3.jpg")
    path = tmp_path / f"a{end}"
    subprocess.run(["tar", "-caf", path, "-C", folder, "."], check=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"damaged: .* Get the file again"):
        find(str(path), CHOICE)
    with gzip.open(tmp_path / "text.gz", "wb") as file:
        file.write(b"hello" * 200)
    with pytest.raises(DataError, match="its content is no tar"):
        find(str(tmp_path / "text.gz"), CHOICE)


def test_tars_in_a_tar_are_classes(tmp_path: Path) -> None:
    """ImageNet's training set: a tar for each class."""
    with tarfile.open(tmp_path / "ILSVRC.tar", "w") as outer:
        for k, name in enumerate(("n02", "n01")):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(2):
                    member = tarfile.TarInfo(f"{name}_{i}.JPEG")
                    member.size = len(jpg(2 * k + i))
                    tar.addfile(member, io.BytesIO(jpg(2 * k + i)))
            member = tarfile.TarInfo(f"{name}.tar")
            member.size = len(inner.getvalue())
            outer.addfile(member, io.BytesIO(inner.getvalue()))
    source = find(str(tmp_path / "ILSVRC.tar"), CHOICE)
    assert seeds(source) == [0, 1, 2, 3]
    assert (source.classes, source.labels.tolist()) == (("n01", "n02"), [1, 1, 0, 0])


def test_a_file_that_holds_no_images_says_what_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"is none of the files .* Give a folder of images"):
        find(str(tmp_path / "a.txt"), CHOICE)
    tar_of(tmp_path / "tars" / "a.tar", ("a.txt", bytes(20_000)))
    with pytest.raises(DataError, match="holds no images"):
        find(str(tmp_path / "tars"), CHOICE)


# -- plugins ------------------------------------------------------------------------------------


def test_heic_and_jpeg_xl(tmp_path: Path) -> None:
    """Photos of phones: written by libheif and libjxl."""
    import pillow_heif
    import pillow_jxl  # noqa: F401

    pillow_heif.register_heif_opener()
    photo = picture(32, 32)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(photo).save(photos / "a.heic", quality=100)
    Image.fromarray(photo).save(photos / "b.jxl", lossless=True)
    said = prepare(photos, "--out", tmp_path / "out", "--size", 32)
    assert "2 files: 2 used" in said
    source = find(str(photos), CHOICE)
    read = reader(source, Square(32, 3))
    assert np.abs(read(0)[0].astype(int) - photo).mean() < 8
    assert np.array_equal(read(1)[0], photo)
