from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cldf_dist.__main__ import main
from cldf_dist.config import Config, load
from cldf_dist.data.cache import FeatureCache
from cldf_dist.data.shards import ShardSet
from cldf_dist.data.slices import foreground
from cldf_dist.run import Run
from cldf_dist.stages.cache import FrozenNets, cached_slices, compute_shard

STORE = Path("cache") / "features.zarr"


@pytest.fixture
def cache(debug_run: Any) -> FeatureCache:
    return FeatureCache(debug_run.folder / STORE)


@pytest.fixture
def config(debug_run: Any) -> Config:
    return load([debug_run.words[0]], debug_run.words[1:])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_cache_holds_training_and_validation_slices_in_order(
    debug_run: Any, cache: FeatureCache
) -> None:
    prepared = ShardSet(debug_run.folder / "prepare")
    tables = [prepared.split(name) for name in ("train", "validation")]
    assert cache.keys == [key for table in tables for key in table.keys]
    np.testing.assert_array_equal(
        cache.column("label"), np.concatenate([table.labels for table in tables])
    )
    assert all(cache.verify(row) for row in range(len(cache)))
    test_patients = set(prepared.patients["test"])
    assert not any(key.rsplit("_", 1)[0] in test_patients for key in cache.keys)


def test_seeds_lie_on_the_subject_and_negative_slices_have_no_object(
    debug_run: Any, cache: FeatureCache
) -> None:
    slices = cached_slices(ShardSet(debug_run.folder / "prepare"))
    labels = cache.column("label")
    assert {0, 1} <= set(labels.tolist())
    for row in range(len(cache)):
        seeds = cache.read("seeds", row)
        table, place = slices.place(row)
        inside = foreground(table.read_image(place))
        assert set(np.unique(seeds)) <= {-1, 0, 1}
        assert (seeds[~inside] == -1).all()
        if labels[row] == 0:
            assert (seeds[inside] == 0).all()
    with pytest.raises(IndexError):
        slices.place(len(slices))


def test_a_shard_computed_again_is_the_same_bit_by_bit(
    debug_run: Any, cache: FeatureCache, config: Config
) -> None:
    slices = cached_slices(ShardSet(debug_run.folder / "prepare"))
    nets = FrozenNets.load(Run(config, "cache", ()))
    torch.set_flush_denormal(True)  # as in the stage
    try:
        keys, values = compute_shard(config, nets, slices, cache.rows_of(1))
    finally:
        torch.set_flush_denormal(False)
    assert keys == [cache.keys[row] for row in cache.rows_of(1)]
    for name, value in values.items():
        for place, row in enumerate(cache.rows_of(1)):
            np.testing.assert_array_equal(value[place], cache.read(name, row), err_msg=name)


def test_an_interrupted_extraction_goes_on_with_the_shards_that_are_missing(
    debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(
        tmp_path, "prepare", "train-diffusion", "train-classifier", "train-cam", "cache"
    )
    store = run.folder / STORE
    # as after a power failure: shard 2 is half written and not signed, shard 3 was never begun
    (run.folder / "cache" / "DONE").unlink()
    for shard in ("2", "3"):
        (store / "done" / "c" / shard).unlink()
    half = store / "up1.1" / "c" / "2" / "0" / "0" / "0" / "0"
    half.write_bytes(half.read_bytes()[:100])
    (store / "seeds" / "c" / "2" / "0" / "0.partial").write_text("")
    untouched = store / "up1.1" / "c" / "1" / "0" / "0" / "0" / "0"
    before = untouched.stat().st_mtime_ns
    assert main(["cache", *run.words]) == 0
    assert untouched.stat().st_mtime_ns == before
    assert files(store) == files(debug_run.folder / STORE)
