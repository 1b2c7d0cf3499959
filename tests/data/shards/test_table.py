import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from cldf_dist.data.shards.table import ShardSet, SliceTable
from cldf_dist.data.shards.write import write_manifest, write_shards
from cldf_dist.data.slices import Geometry, Slice
from cldf_dist.system.files import DamagedShardError

# webdataset leaves closing its files to the garbage collector
webdataset_leaks = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

GEOMETRY = Geometry(
    patient="case_0",
    shape=(8, 8, 5),
    affine=((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
    spacing=(1.0, 1.0, 1.0),
    axes="RAS",
    box=(0, 8, 0, 8),
    image_size=8,
    indices=(0, 1, 2, 3, 4),
)


def make_slices(patient: str, count: int = 5, with_mask: bool = True) -> list[Slice]:
    """Labels 0, 1, -1, 0, 1, ...; the image depends on patient and index alone."""
    slices = []
    for index in range(count):
        source = np.random.default_rng([*patient.encode(), index])
        image = source.uniform(-0.9, 1, (2, 8, 8)).astype(np.float32)
        image[:, :2] = -1
        mask = source.random((8, 8)) > 0.5
        slices.append(
            Slice(
                key=f"{patient}_{index:04d}",
                patient=patient,
                index=index,
                label=(0, 1, -1)[index % 3],
                image=image,
                mask=mask if with_mask else None,
            )
        )
    return slices


def prepare(folder: Path, with_mask: bool = True) -> list[Slice]:
    """Train: case_0 and case_1 in shards of 4; test: case_2. Returns the training slices."""
    train = [*make_slices("case_0", 5, with_mask), *make_slices("case_1", 5, with_mask)]
    records = write_shards(folder, "train", iter(train), 4)
    records += write_shards(folder, "test", make_slices("case_2", 3), 4)
    write_manifest(
        folder,
        settings={"image_size": 8},
        channels=("flair", "t1"),
        splits={"train": ["case_0", "case_1"], "validation": [], "test": ["case_2"]},
        geometry={"case_0": GEOMETRY},
        shards=records,
    )
    return train


def damage(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(offset: int) -> Callable[[bytearray], bytearray]:
    def change(content: bytearray) -> bytearray:
        content[offset] ^= 1
        return content

    return change


def span(folder: Path, key: str, member: str) -> tuple[str, int, int]:
    """Shard name, offset and length of a member."""
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        for sample in shard["samples"]:
            if sample["key"] == key:
                return shard["name"], sample[member][0], sample[member][1]
    raise KeyError(key)


def test_slices_come_back_as_they_were_written(tmp_path: Path) -> None:
    train = prepare(tmp_path)
    table = ShardSet(tmp_path).split("train")
    assert len(table) == 10
    assert table.keys == tuple(item.key for item in train)
    assert table.patients == tuple(item.patient for item in train)
    assert table.indices.tolist() == [item.index for item in train]
    assert table.labels.tolist() == [item.label for item in train]
    assert table.labels.dtype == np.int8
    assert table.shard_of.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    for row, item in enumerate(train):
        image = table.read_image(row)
        assert image.dtype == np.float32
        np.testing.assert_allclose(image, item.image, atol=0.51 / 32767)
        assert (image[:, :2] == -1).all()
        np.testing.assert_array_equal(table.read_mask(row), item.mask)
    np.testing.assert_array_equal(
        table.read_images([7, 0]), np.stack([table.read_image(7), table.read_image(0)])
    )


def test_manifest_describes_the_set(tmp_path: Path) -> None:
    prepare(tmp_path)
    data = ShardSet(tmp_path)
    assert data.manifest["format"] == "cldf-shards"
    assert data.manifest["settings"] == {"image_size": 8}
    assert data.manifest["channels"] == ["flair", "t1"]
    assert data.patients["test"] == ["case_2"]
    assert data.geometry("case_0") == GEOMETRY
    first = data.manifest["shards"][0]
    assert first["name"] == "train-00000.tar"
    assert first["num_slices"] == 4
    assert first["label_counts"] == {"-1": 1, "0": 2, "1": 1}
    assert len(data.split("test")) == 3
    assert len(data.split("validation")) == 0
    data.verify()


def test_same_slices_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "manifest.json",
        "test-00000.tar",
        *(f"train-0000{n}.tar" for n in range(3)),
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rewriting_a_split_removes_its_old_shards_only(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "train-00002.tar.partial").write_bytes(b"left by a killed process")
    write_shards(tmp_path, "train", make_slices("case_0", 2), 4)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["manifest.json", "test-00000.tar", "train-00000.tar"]


def test_failed_write_leaves_no_shard(tmp_path: Path) -> None:
    broken = make_slices("case_0", 2)
    broken[1] = Slice("case_0_0001", "case_0", 1, 0, np.array([["text"]]), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_shards(tmp_path, "train", broken, 4)
    assert list(tmp_path.iterdir()) == []


@webdataset_leaks
def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    train = prepare(tmp_path)
    pattern = str(tmp_path / "train-{00000..00002}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [item.key for item in train]
    for sample, item in zip(samples, train):
        members = {name for name in sample if not name.startswith("__")}
        assert members == {"image.npy", "meta.json", "mask.npy"}
        image = np.load(io.BytesIO(sample["image.npy"]), allow_pickle=False)
        assert image.dtype == np.int16
        np.testing.assert_allclose(image / 32767, item.image, atol=0.51 / 32767)
        mask = np.load(io.BytesIO(sample["mask.npy"]), allow_pickle=False)
        np.testing.assert_array_equal(mask, item.mask)
        assert json.loads(sample["meta.json"]) == {
            "key": item.key,
            "patient": item.patient,
            "index": item.index,
            "label": item.label,
        }


@webdataset_leaks
def test_slices_without_masks_have_no_mask_member(tmp_path: Path) -> None:
    prepare(tmp_path, with_mask=False)
    assert ShardSet(tmp_path).split("train").read_mask(0) is None
    pattern = str(tmp_path / "train-00000.tar")
    for sample in webdataset.WebDataset(pattern, shardshuffle=False):
        assert "mask.npy" not in sample


@pytest.mark.parametrize("place", ["header", "first pixel", "last pixel"])
def test_flipped_byte_is_found_and_named(tmp_path: Path, place: str) -> None:
    prepare(tmp_path)
    shard, offset, length = span(tmp_path, "case_1_0000", "image")
    at = {"header": offset + 9, "first pixel": offset + length - 256, "last pixel": -1}
    damage(tmp_path / shard, flip(offset + length - 1 if at[place] < 0 else at[place]))
    data = ShardSet(tmp_path)
    table = data.split("train")
    readings = (table.read_image, table.read_stored)
    for read in (*readings, lambda row: table.read_stored(row, np.empty((2, 8, 8), np.int16))):
        with pytest.raises(DamagedShardError, match=r"-00001\.tar .* case_1_0000\.image\.npy"):
            read(5)
    with pytest.raises(DamagedShardError, match=r"train-00001\.tar is damaged: its sha256"):
        data.verify()
    data.split("train").read_image(4)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    prepare(tmp_path)
    table = ShardSet(tmp_path).split("train")
    shard, offset, _ = span(tmp_path, "case_0_0003", "image")
    damage(tmp_path / shard, lambda content: content[: offset + 100])
    with pytest.raises(DamagedShardError, match=r"train-00000\.tar is truncated: \d+ of \d+ bytes"):
        ShardSet(tmp_path)
    with pytest.raises(DamagedShardError, match=r"train-00000\.tar is truncated: case_0_0003"):
        table.read_image(3)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    prepare(tmp_path)
    table = ShardSet(tmp_path).split("train")
    (tmp_path / "train-00002.tar").unlink()
    with pytest.raises(DamagedShardError, match=r"train-00002\.tar is missing"):
        ShardSet(tmp_path)
    with pytest.raises(DamagedShardError, match=r"train-00002\.tar is missing"):
        table.read_image(9)


def test_damaged_slices_are_dropped_counted_and_told_where_asked(tmp_path: Path) -> None:
    train = prepare(tmp_path)
    shard, offset, _ = span(tmp_path, "case_0_0001", "image")
    damage(tmp_path / shard, flip(offset + 200))
    (tmp_path / "train-00001.tar").unlink()
    data = ShardSet(tmp_path, on_damaged="skip")
    with pytest.warns(UserWarning, match=r"5 of 10 slices are damaged.*train-00000\.tar"):
        table = data.split("train")
    kept = [item for row, item in enumerate(train) if row in (0, 2, 3, 8, 9)]
    assert table.keys == tuple(item.key for item in kept)
    assert table.shard_of.tolist() == [0, 0, 0, 2, 2]
    for row, item in enumerate(kept):
        np.testing.assert_allclose(table.read_image(row), item.image, atol=0.51 / 32767)
    assert len(data.split("test")) == 3


def test_table_survives_pickling_with_files_open(tmp_path: Path) -> None:
    prepare(tmp_path)
    table = ShardSet(tmp_path).split("train")
    image = table.read_image(3)
    copy: SliceTable = pickle.loads(pickle.dumps(table))
    np.testing.assert_array_equal(copy.read_image(3), image)


def test_more_shards_than_open_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cldf_dist.data.shards.files.MAX_OPEN_FILES", 2)
    prepare(tmp_path)
    table = ShardSet(tmp_path).split("train")
    for row in (0, 4, 8, 0, 4, 8):
        table.read_image(row)


def test_stored_slices_are_written_into_given_memory(tmp_path: Path) -> None:
    prepare(tmp_path)
    table = ShardSet(tmp_path).split("train")
    batch = np.zeros((len(table), 2, 8, 8), np.int16)
    for row in range(len(table)):
        assert table.read_stored(row, batch[row]) is not table.read_stored(row)
        np.testing.assert_array_equal(table.read_stored(row), batch[row])
        np.testing.assert_array_equal(batch[row] / np.float32(32767), table.read_image(row))
    for out in (
        np.zeros((2, 8, 8), np.uint16),
        np.zeros((8, 2, 8), np.int16),
        np.zeros((2, 8, 9), np.int16),
        np.zeros((2, 8, 800), np.int16),
        np.zeros((2, 8, 16), np.int16)[:, :, ::2],
    ):
        with pytest.raises(ValueError, match=r"contiguous array of \(2, 8, 8\) int16, got"):
            table.read_stored(0, out)


def test_images_do_not_share_memory(tmp_path: Path) -> None:
    """What is read next must not change what was read before."""
    prepare(tmp_path)
    table = ShardSet(tmp_path).split("train")
    image, stored, mask = table.read_image(0), table.read_stored(0), table.read_mask(0)
    assert mask is not None
    before = image.copy(), stored.copy(), mask.copy()
    for row in range(len(table)):
        table.read_image(row)
        table.read_mask(row)
    for kept, expected in zip((image, stored, mask), before):
        np.testing.assert_array_equal(kept, expected)


def test_unprepared_folder_tells_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run: cldf prepare"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"format": "cldf-shards", "version": 2}', "{}"])
def test_other_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        ShardSet(tmp_path)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path)
    data = ShardSet(tmp_path)
    with pytest.raises(ValueError, match="splits train, validation, test; got 'dev'"):
        data.split("dev")
    with pytest.raises(ValueError, match="no patient 'case_9'"):
        data.geometry("case_9")
    with pytest.raises(ValueError, match="must be error or skip, got 'ignore'"):
        ShardSet(tmp_path, on_damaged="ignore")
    with pytest.raises(ValueError, match="slices_per_shard must be >= 1, got 0"):
        write_shards(tmp_path, "train", [], 0)
