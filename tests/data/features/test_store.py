import gc
import multiprocessing
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.features.store_creation import KEY_BYTES, repair_metadata
from cldf_dist.system.files import DamagedShardError

NUM_SLICES, PER_SHARD = 7, 3  # the last shard is not full
ARRAYS = {
    "up0.1": ((2, 4, 4, 3), "float16"),
    "seeds": ((8, 8), "int8"),
    "label": ((), "int8"),
    "probability": ((), "float32"),
    "whole": ((2, 4, 4, 3), "int8"),
    "whole.scale": ((2, 3), "float32"),
}


def values(rows: range) -> dict[str, npt.NDArray[Any]]:
    """The arrays of some slices; slice 0 is all zeros, which zarr would not write."""
    result = {}
    for name, (shape, dtype) in ARRAYS.items():
        parts = []
        for row in rows:
            rng = np.random.default_rng([row, len(name)])
            drawn = rng.uniform(1, 100, size=shape) * rng.choice([-1, 1], size=shape)
            parts.append((drawn * (row > 0)).astype(dtype))
        result[name] = np.stack(parts)
    return result


def one(name: str, row: int) -> npt.NDArray[Any]:
    result: npt.NDArray[Any] = values(range(row, row + 1))[name][0]
    return result


def keys(rows: range) -> list[str]:
    return [f"patient_é_{row:04d}" for row in rows]


def empty(folder: Path) -> FeatureCache:
    return FeatureCache.create(
        folder / "features.zarr",
        NUM_SLICES,
        ARRAYS,
        slices_per_shard=PER_SHARD,
        attributes={"taps": ["up0.1"]},
    )


def write(cache: FeatureCache, *shards: int) -> None:
    for shard in shards:
        rows = cache.slices_of(shard)
        cache.write_shard(shard, keys(rows), values(rows))


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    written = empty(tmp_path)
    write(written, 0, 1, 2)
    return FeatureCache(written.folder)


def shard_file(cache: FeatureCache, name: str, shard: int) -> Path:
    rank = len(ARRAYS[name][0])
    return cache.folder / name / "c" / str(shard) / Path(*["0"] * rank)


def change_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_what_was_written_is_read(cache: FeatureCache) -> None:
    assert len(cache) == NUM_SLICES
    assert cache.num_shards == 3
    assert cache.names == list(ARRAYS)
    assert cache.attributes["taps"] == ["up0.1"]
    assert cache.slice_shape("up0.1") == (2, 4, 4, 3)
    expected = values(range(NUM_SLICES))
    for row in range(NUM_SLICES):
        for name, (shape, dtype) in ARRAYS.items():
            read = cache.read(name, row)
            assert (read.shape, read.dtype) == (shape, np.dtype(dtype))
            np.testing.assert_array_equal(read, expected[name][row])
        assert cache.verify(row)
    np.testing.assert_array_equal(cache.column("label"), expected["label"])
    assert cache.keys == keys(range(NUM_SLICES))


def test_plain_zarr_reads_the_same_values(cache: FeatureCache) -> None:
    group = zarr.open_group(cache.folder, mode="r")
    for name in ARRAYS:
        np.testing.assert_array_equal(np.asarray(group[name][:]), values(range(NUM_SLICES))[name])


def test_tensorstore_reads_the_same_values(cache: FeatureCache) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    for name in ARRAYS:
        store = {"driver": "file", "path": str(cache.folder / name)}
        opened = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
        np.testing.assert_array_equal(opened.read().result(), values(range(NUM_SLICES))[name])


def test_reading_copies_nothing_and_cannot_change_the_file(cache: FeatureCache) -> None:
    features = cache.read("up0.1", 4)
    assert not features.flags.owndata
    assert not features.flags.writeable


def test_every_file_has_one_writer(cache: FeatureCache) -> None:
    for name in (*ARRAYS, "key", "done"):
        rank = len(ARRAYS[name][0]) if name in ARRAYS else int(name == "key")
        written = {path.name for path in (cache.folder / name / "c").iterdir()}
        assert written == {"0", "1", "2"}, f"{name} is cut at the same slices"
        files = [path for path in (cache.folder / name / "c").rglob("*") if path.is_file()]
        assert len(files) == 3
        assert all(
            len(path.relative_to(cache.folder / name / "c").parts) == rank + 1 for path in files
        )


def test_a_slice_that_was_never_written_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    cache = empty(tmp_path)
    write(cache, 1)
    assert [cache.is_done(shard) for shard in range(3)] == [False, True, False]
    np.testing.assert_array_equal(cache.read("seeds", 3), values(range(3, 4))["seeds"][0])
    for row in (0, 6):
        with pytest.raises(
            RuntimeError, match=f"slices {row} to .* were never written; run: cldf cache CONFIG"
        ):
            cache.read("up0.1", row)
        assert not cache.verify(row)
    assert cache.num_done(range(3)) == 3
    assert cache.num_done(range(2, 3)) == 0
    assert cache.keys[2:4] == ["", "patient_é_0003"]
    write(cache, 0)
    assert cache.read("up0.1", 0).max() == 0, "an all-zero slice is fine once it is signed"


def test_a_lost_shard_file_is_found(cache: FeatureCache) -> None:
    cache.read("up0.1", 4)
    shard_file(cache, "up0.1", 1).unlink()
    for reader in (cache, FeatureCache(cache.folder)):
        for _ in range(2):
            with pytest.raises(DamagedShardError, match=r"up0\.1/c/1/0/0/0/0 is lost; run: cldf"):
                reader.read("up0.1", 4)
        reader.read("seeds", 4)
        assert not reader.verify(4)
        assert reader.verify(0)


def test_slices_of_nothing_but_zeros_are_written(tmp_path: Path) -> None:
    """A file that is not there never stands for zeros."""
    cache = empty(tmp_path)
    zeros = {name: np.zeros_like(value) for name, value in values(range(3)).items()}
    cache.write_shard(0, keys(range(3)), zeros)
    assert shard_file(cache, "up0.1", 0).exists()
    assert all(cache.verify(row) for row in range(3))


@pytest.mark.parametrize("name", ["up0.1", "seeds"])
def test_a_changed_byte_is_found_on_first_touch(cache: FeatureCache, name: str) -> None:
    shape, dtype = ARRAYS[name]
    length = int(np.prod(shape)) * np.dtype(dtype).itemsize + 4
    change_byte(shard_file(cache, name, 1), length + 5)  # in the second slice of the shard
    fresh = FeatureCache(cache.folder)
    fresh.read(name, 3)
    with pytest.raises(
        DamagedShardError,
        match=r"slice 1 of the file, is damaged; run: cldf cache CONFIG cache.ver",
    ):
        fresh.read(name, 4)
    assert not fresh.verify(4)
    assert fresh.verify(3)
    assert fresh.verify(5)


def test_a_truncated_shard_file_is_found(cache: FeatureCache) -> None:
    path = shard_file(cache, "up0.1", 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged: its index is truncated or changed"):
        FeatureCache(cache.folder).read("up0.1", 6)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        FeatureCache(cache.folder).read("up0.1", 6)


def test_values_of_another_slice_are_found(cache: FeatureCache) -> None:
    shutil.copyfile(shard_file(cache, "seeds", 1), shard_file(cache, "seeds", 0))
    fresh = FeatureCache(cache.folder)
    assert not any(fresh.verify(row) for row in range(3))
    assert fresh.verify(3)


def _read_there(cache: FeatureCache, row: int, queue: Any) -> None:
    queue.put((cache.read("up0.1", row).copy(), cache.keys[row]))


def test_a_spawned_process_reads_the_same(cache: FeatureCache) -> None:
    cache.read("up0.1", 5)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    reader = context.Process(target=_read_there, args=(cache, 5, queue))
    reader.start()
    features, key = queue.get(timeout=120)
    reader.join()
    np.testing.assert_array_equal(features, cache.read("up0.1", 5))
    assert key == cache.keys[5]


def test_leftovers_of_killed_writers_of_these_shards_are_swept(cache: FeatureCache) -> None:
    """Another process may be writing its own shards right now."""
    mine, other = (shard_file(cache, "seeds", shard) for shard in (1, 2))
    leftovers = [path.with_name(f".{path.name}.123.partial") for path in (mine, other)]
    leftovers.append(cache.folder / "done" / "c" / ".1.123.partial")
    for path in leftovers:
        path.write_text("")
    assert cache.sweep([1]) == 2
    assert cache.sweep([1]) == 0
    assert [path.exists() for path in leftovers] == [False, True, False]
    assert all(cache.verify(row) for row in range(NUM_SLICES))


def test_a_key_has_a_longest_length(tmp_path: Path) -> None:
    cache = empty(tmp_path)
    rows = cache.slices_of(2)
    longest = "é" * (KEY_BYTES // 2)
    cache.write_shard(2, [longest], values(rows))
    assert cache.keys[6] == longest
    with pytest.raises(ValueError, match=f"has {KEY_BYTES + 1} bytes; the cache takes {KEY_BYTES}"):
        cache.write_shard(2, [longest + "x"], values(rows))


def test_a_shard_written_again_replaces_whatever_was_there(cache: FeatureCache) -> None:
    cache.read("up0.1", 4)
    other = {name: -value for name, value in values(range(3, 6)).items()}
    cache.write_shard(1, keys(range(3, 6)), other)
    np.testing.assert_array_equal(cache.read("up0.1", 4), other["up0.1"][1])
    # a stump under the final name, as after a power failure
    shard_file(cache, "up0.1", 1).write_bytes(b"stump")
    write(cache, 1)
    np.testing.assert_array_equal(cache.read("up0.1", 4), values(range(4, 5))["up0.1"][0])
    assert all(cache.verify(row) for row in range(NUM_SLICES))


def test_a_shard_is_written_whole(tmp_path: Path) -> None:
    cache = empty(tmp_path)
    with pytest.raises(ValueError, match="shard 0 takes 3 slices"):
        cache.write_shard(0, keys(range(2)), values(range(2)))
    incomplete = values(range(3))
    del incomplete["seeds"]
    with pytest.raises(ValueError, match=r"shard 0 takes 3 slices of .*seeds"):
        cache.write_shard(0, keys(range(3)), incomplete)
    assert not cache.is_done(0)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no feature cache at .*; run: cldf cache CONFIG"):
        FeatureCache(tmp_path / "nothing")
    zarr.create_group(tmp_path / "other", zarr_format=3)
    with pytest.raises(ValueError, match="is a zarr group, but not a cldf-features one"):
        FeatureCache(tmp_path / "other")


def test_an_unknown_array_is_named(cache: FeatureCache) -> None:
    with pytest.raises(KeyError, match=r"holds no array 'up9\.9'; it has up0\.1, seeds"):
        cache.read("up9.9", 0)


def test_whole_numbers_have_a_scale(cache: FeatureCache) -> None:
    assert cache.scale("up0.1", 4) is None
    np.testing.assert_array_equal(cache.scale("whole", 4), values(range(4, 5))["whole.scale"][0])


def test_a_store_that_another_process_writes_anew_is_read_anew(cache: FeatureCache) -> None:
    held = cache.read("up0.1", 4)
    before = held.copy()
    other = {name: -value for name, value in values(range(3, 6)).items()}
    writer = FeatureCache(cache.folder)
    writer.discard(1)
    with pytest.raises(RuntimeError, match="were never written"):
        cache.read("up0.1", 4)
    writer.write_shard(1, keys(range(3, 6)), other)
    np.testing.assert_array_equal(cache.read("up0.1", 4), other["up0.1"][1])
    np.testing.assert_array_equal(cache.read("seeds", 5), other["seeds"][2])
    np.testing.assert_array_equal(held, before)


def test_damage_that_was_repaired_is_read(cache: FeatureCache) -> None:
    change_byte(shard_file(cache, "seeds", 1), 3)
    with pytest.raises(DamagedShardError):
        cache.read("seeds", 3)
    write(FeatureCache(cache.folder), 1)
    np.testing.assert_array_equal(cache.read("seeds", 3), values(range(3, 4))["seeds"][0])


def test_many_files_need_no_open_descriptors(tmp_path: Path) -> None:
    """A process may often have 1024 of them only, and a cache has many thousand files."""
    cache = FeatureCache.create(
        tmp_path / "features.zarr", 120, {"seeds": ((3, 2), "int8")}, slices_per_shard=1,
        attributes={},
    )  # fmt: skip
    for shard in range(120):
        cache.write_shard(shard, keys(range(shard, shard + 1)), {"seeds": np.ones((1, 3, 2))})
    fresh = FeatureCache(cache.folder)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, before[1]))
    try:
        assert fresh.num_done(range(120)) == 120
        assert fresh.keys == keys(range(120))
        held = [fresh.read("seeds", row) for row in range(120)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    del fresh
    gc.collect()
    assert all((values == 1).all() for values in held), "views outlive the cache"


def test_memory_of_a_mapping_is_given_back(cache: FeatureCache) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("features.zarr/up0.1/c/1")

    view = cache.read("up0.1", 4)
    assert mappings() == 1
    cache._mapped.clear()
    gc.collect()
    assert mappings() == 1, "a view holds it"
    del view
    gc.collect()
    assert mappings() == 0


@pytest.mark.parametrize("name", ["up0.1", "key", "done"])
def test_a_folder_in_the_place_of_a_file_is_damage(cache: FeatureCache, name: str) -> None:
    path = shard_file(cache, name, 1) if name in ARRAYS else cache._path(name, 1)
    path.unlink()
    path.mkdir()
    fresh = FeatureCache(cache.folder)
    assert fresh.damaged_slices(1) == [3, 4, 5]
    fresh.write_shard(1, keys(range(3, 6)), values(range(3, 6)))
    assert not fresh.damaged_slices(1, keys(range(NUM_SLICES)))


def test_a_key_of_another_slice_is_damage(cache: FeatureCache) -> None:
    expected = keys(range(NUM_SLICES))
    assert not cache.damaged_slices(1, expected)
    other = [*expected[:4], "somebody else", *expected[5:]]
    assert cache.damaged_slices(1, other) == [4]
    cache._path("key", 1).unlink()
    assert cache.damaged_slices(1, expected) == [3, 4, 5]
    with pytest.raises(DamagedShardError, match=r"key/c/1/0 is lost; run: cldf cache CONFIG cache"):
        FeatureCache(cache.folder).keys  # noqa: B018


@pytest.mark.parametrize("content", [b"", b'{"zarr_format"', b"[]", None])
@pytest.mark.parametrize("name", ["", "seeds"])
def test_damaged_descriptions_are_named_and_repaired(
    cache: FeatureCache, name: str, content: bytes | None
) -> None:
    about = cache.folder / name / "zarr.json"
    before = about.read_bytes()
    if content is None:
        about.unlink()
        about.mkdir()
    else:
        about.write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"zarr\.json is .*; run: cldf cache CONFIG cache"):
        FeatureCache(cache.folder).read("seeds", 3)
    fresh = FeatureCache.create(
        cache.folder.parent / "fresh", NUM_SLICES, ARRAYS, slices_per_shard=PER_SHARD,
        attributes={"taps": ["up0.1"]},
    )  # fmt: skip
    found = repair_metadata(cache.folder, fresh.folder)
    assert found == [str(about.relative_to(cache.folder))]
    assert about.read_bytes() == before
    assert not repair_metadata(cache.folder, fresh.folder)
    assert all(FeatureCache(cache.folder).verify(row) for row in range(NUM_SLICES))


def test_no_more_files_are_mapped_than_the_system_allows(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cldf_dist.data.features.store.MOST_MAPPED", 2)
    for row in (*range(NUM_SLICES), 0):
        np.testing.assert_array_equal(
            cache.read("up0.1", row), values(range(row, row + 1))["up0.1"][0]
        )
        assert len(cache._mapped) <= 2


def test_who_comes_second_gets_the_store_of_the_first(cache: FeatureCache) -> None:
    second = empty(cache.folder.parent)
    assert second.keys == keys(range(NUM_SLICES))
    assert [path.name for path in cache.folder.parent.iterdir()] == ["features.zarr"]


def test_a_store_of_another_version_is_refused(cache: FeatureCache) -> None:
    about = cache.folder / "zarr.json"
    about.write_text(about.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match="is of version 1, this program reads version 2; delete"):
        FeatureCache(cache.folder)
