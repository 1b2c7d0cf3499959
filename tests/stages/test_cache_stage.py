import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cldf_dist.__main__ import main
from cldf_dist.config import Config, load
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.cache_parts import COUNT_FILE
from cldf_dist.inference.feature_extraction import cached_slices, compute_shard
from cldf_dist.inference.frozen_nets import FrozenNets
from cldf_dist.inference.seed_cam import with_map
from cldf_dist.runs.run import Run
from cldf_dist.system.locks import FolderLock

STORE = Path("cache") / "features.zarr"
EARLIER = (
    "prepare", "train-diffusion", "tune-label-embedding", "train-classifier", "train-cam",
    "train-patch-classifier",
)  # fmt: skip


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
        inside = body_mask(table.read_image(place))
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
    nets = FrozenNets.load(config, Run(config, "cache", ()))
    config = with_map(config, cache.attributes["seed_cam"]["map"])
    torch.set_flush_denormal(True)  # as in the stage
    try:
        keys, values = compute_shard(config, nets, slices, cache.slices_of(1))
    finally:
        torch.set_flush_denormal(False)
    assert keys == [cache.keys[row] for row in cache.slices_of(1)]
    for name, value in values.items():
        for place, row in enumerate(cache.slices_of(1)):
            np.testing.assert_array_equal(value[place], cache.read(name, row), err_msg=name)


def test_an_interrupted_extraction_goes_on_with_the_shards_that_are_missing(
    debug_run: Any, tmp_path: Path
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER, "cache")
    store = run.folder / STORE
    # as after a power failure: shard 2 is half written and not signed, shard 3 was never begun
    (run.folder / "cache" / "DONE").unlink()
    for shard in ("2", "3"):
        (store / "done" / "c" / shard).unlink()
    half = store / "up1.1" / "c" / "2" / "0" / "0" / "0" / "0"
    half.write_bytes(half.read_bytes()[:100])
    (store / "seeds" / "c" / "2" / "0" / ".0.99.partial").write_text("")
    untouched = store / "up1.1" / "c" / "1" / "0" / "0" / "0" / "0"
    before = untouched.stat().st_mtime_ns
    assert main(["cache", *run.words]) == 0
    assert untouched.stat().st_mtime_ns == before
    assert files(store) == files(debug_run.folder / STORE)


@pytest.fixture
def inputs(debug_run: Any, tmp_path: Path) -> Any:
    """A run with everything that the cache stage needs, and no cache."""
    return debug_run.copy_to(tmp_path, *EARLIER)


def test_kills_ranks_and_parts_change_nothing(
    debug_run: Any, tmp_path: Path, environment: dict[str, str]
) -> None:
    """One test, because torch is imported once: the same store, bit by bit, from one process, from
    two, and from one that was killed twenty times."""
    runs = [debug_run.copy_to(tmp_path / name, *EARLIER) for name in ("one", "two", "killed")]
    one, two, killed = ([*run.words, "cache.slices_per_shard=1"] for run in runs)
    stores = [run.folder / STORE for run in runs]
    plan = [
        {"words": one},
        {"words": two, "ranks": 2},
        {"words": killed, "kills": 20, "store": str(stores[2])},
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "forked_cache.py"), json.dumps(plan)],
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["codes"] for result in results] == [[0], [0, 0], [0]], done.stderr[-5000:]
    assert results[2]["killed"] == 20
    expected = files(stores[0])
    assert any(name.startswith("up1.1/c/53/") for name in expected)
    for store in stores[1:]:
        assert files(store) == expected


def test_parts_make_the_cache_together_and_the_last_one_finishes_the_stage(
    debug_run: Any, inputs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = inputs.folder / "cache"
    assert main(["cache", *inputs.words, "cache.part=2/3"]) == 0
    assert (stage / "parts" / "2-of-3" / "DONE").exists()
    assert not (stage / "DONE").exists()
    assert "cache, part 2/3, is finished; others are missing" in capsys.readouterr().out
    assert sorted(path.name for path in (stage / "features.zarr/done/c").iterdir()) == ["2", "3"]
    assert main(["cache", *inputs.words, "cache.part=1/3"]) == 0
    assert main(["cache", *inputs.words, "cache.part=1/3"]) == 0
    assert "finished before" in capsys.readouterr().err
    assert main(["cache", *inputs.words, "cache.part=3/3"]) == 0
    assert (stage / "DONE").exists()
    assert files(stage / "features.zarr") == files(debug_run.folder / STORE)
    assert json.loads((stage / "DONE").read_text())["slices"] == 54
    (stage / "DONE").unlink()  # as if the last part had died before it finished the stage
    assert main(["cache", *inputs.words, "cache.part=1/3"]) == 0
    assert (stage / "DONE").exists()


def test_the_whole_stage_makes_what_parts_left_out(debug_run: Any, inputs: Any) -> None:
    assert main(["cache", *inputs.words, "cache.part=2/4"]) == 0
    assert main(["cache", *inputs.words]) == 0
    assert files(inputs.folder / STORE) == files(debug_run.folder / STORE)


def test_two_jobs_never_make_the_same_part(inputs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stage = inputs.folder / "cache"
    stage.mkdir()
    alone = FolderLock(stage)
    assert main(["cache", *inputs.words, "cache.part=1/2"]) == 1
    assert "is in use by process" in capsys.readouterr().err
    alone.release()
    (stage / COUNT_FILE).write_text('{"parts": 3}')
    others = FolderLock.shared(stage)
    assert main(["cache", *inputs.words, "cache.part=1/2"]) == 1
    assert "jobs with cache.part=i/3 are running" in capsys.readouterr().err
    assert main(["cache", *inputs.words]) == 1
    assert "is in use by" in capsys.readouterr().err
    assert main(["cache", *inputs.words, "cache.part=1/3"]) == 0
    others.release()
    assert main(["cache", *inputs.words, "cache.part=1/2"]) == 0, "nobody is at work any more"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cache.part=3/2"], "cache.part must be i/n with 1 <= i <= n, such as 1/4, got '3/2'"),
        (["cache.part=0/2"], "cache.part must be i/n"),
        (["cache.part=half"], "cache.part must be i/n"),
        (["cache.part=01/02"], "cache.part must be i/n"),
        (["cache.part=٣/٤"], "cache.part must be i/n"),
        (["cache.part=1/2", "cache.verify=true"], "leave cache.part=1/2 out"),
        (["features.storage=fp4"], "features.storage must be one of float16, int8, got 'fp4'"),
        (
            ["features.combine_noise_samples=sum"],
            "features.combine_noise_samples must be one of stack, average",
        ),
    ],
)
def test_a_wrong_setting_is_refused(
    inputs: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["cache", *inputs.words, *words]) == 1
    assert said in capsys.readouterr().err


def test_a_part_is_for_the_cache_stage_alone(
    inputs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *inputs.words, "cache.part=1/2"]) == 1
    assert "cache.part is for the cache stage, not for run" in capsys.readouterr().err


@pytest.mark.parametrize("num_processes", [1, 2])
def test_verification_makes_again_what_is_damaged_and_nothing_else(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_processes: int
) -> None:
    run = debug_run.copy_to(tmp_path, *EARLIER, "cache")
    store = run.folder / STORE
    features, lost, done, key, about, intact = (
        store / name
        for name in (
            "up1.1/c/2/0/0/0/0", "seeds/c/4/0/0", "done/c/5", "key/c/6/0", "seeds/zarr.json",
            "up0.1/c/1/0/0/0/0",
        )
    )  # fmt: skip
    content = bytearray(features.read_bytes())
    content[1000] ^= 4
    features.write_bytes(bytes(content))
    lost.unlink()
    done.write_bytes(b"short")
    key.unlink()
    about.write_bytes(b"{")
    before = intact.stat().st_mtime_ns
    words = [*run.words, "cache.verify=true", f"cache.verify_processes={num_processes}"]
    assert main(["cache", *words]) == 0
    said = capsys.readouterr().err
    assert f"{about} was lost or damaged; it is restored" in said
    # one slice of shard 2, and all of shards 4, 5 and 6
    assert "23 of 54 slices are damaged or missing" in said
    assert "4 shards are computed again" in said
    assert intact.stat().st_mtime_ns == before
    assert files(store) == files(debug_run.folder / STORE)
    assert len(json.loads((run.folder / "cache" / "DONE").read_text())["damaged"]) == 23
    assert main(["cache", *words]) == 0
    assert "0 of 54 slices are damaged" in capsys.readouterr().err


def test_a_cache_begun_with_other_settings_is_not_gone_on_with(
    inputs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *inputs.words, "cache.part=1/2"]) == 0
    assert main(["cache", *inputs.words, "cache.part=2/2", "features.timesteps=[50]"]) == 1
    assert "was begun with features.timesteps=[100], not [50]" in capsys.readouterr().err
    assert main(["cache", *inputs.words, "cache.part=2/2", "cache.slices_per_shard=4"]) == 1
    assert "was begun with cache.slices_per_shard=8, not 4" in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_computed(
    inputs: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(inputs.folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert main(["cache", *inputs.words]) == 1
    assert "the cache needs 0.00 GB more" in capsys.readouterr().err
    assert not (inputs.folder / STORE).exists()


@pytest.mark.parametrize(
    "words",
    [
        ["features.storage=int8"],
        [
            "features.noise=drawn",
            "features.combine_timesteps=average",
            "features.num_noise_samples=2",
        ],
    ],
    ids=["int8", "average"],
)
def test_every_form_of_features_trains_and_segments(inputs: Any, words: list[str]) -> None:
    words = [*inputs.words, *words, "features.timesteps=[50,100]", "cg_diff.enabled=false",
             "cg_cdm.enabled=false"]  # fmt: skip
    for stage in ("cache", "train-decoder", "segment"):
        assert main([stage, *words]) == 0
    cache = FeatureCache(inputs.folder / STORE)
    is_int8 = "features.storage=int8" in words
    assert cache.slice_shape("up0.1")[0] == (2 if is_int8 else 1)
    assert cache.read("up0.1", 3).dtype == (np.int8 if is_int8 else np.float16)
    assert all(cache.verify(row) for row in range(len(cache)))


def test_the_estimate_names_bytes_and_time(inputs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *inputs.words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "slices: 54, together 0.00 GB; the disk has" in told
    assert "s per slice on this machine's cpu" in told
    assert not (inputs.folder / "cache").exists()
