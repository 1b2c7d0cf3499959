"""The scaling model is its own arithmetic, and what it says of files is what lies on the disk."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from cldf_dist.data.features.store import OWN, FeatureCache

PARAMETERS = 100 * 2**20 // 4  # 100 MiB of gradients: four buckets of DDP
MEASURED = {8: 0.1, 16: 0.18, 32: 0.34}


def test_step_is_compute_and_what_of_the_all_reduce_is_not_hidden(module):
    """1 GiB/s: two processes move 100 MiB in 0.0977 s, and wait for 2 messages of each bucket."""
    model = module("scaling_model")
    training = model.Training(PARAMETERS, 32, MEASURED)
    slow = model.Network(2.0**30, 0.001, overlap=0.0)
    moved = 100 / 1024 + 2 * 4 * 0.001
    found = model.step(training, 2, slow)
    assert found.compute == 0.18
    assert found.communication == found.exposed == pytest.approx(moved)
    assert found.seconds == pytest.approx(0.18 + moved)
    assert model.efficiency(training, 2, slow) == pytest.approx(0.34 / (2 * (0.18 + moved)))


def test_backward_pass_hides_what_it_can_but_never_the_last_bucket(module):
    model = module("scaling_model")
    training = model.Training(PARAMETERS, 32, MEASURED)
    network = model.Network(2.0**30, 0.0, overlap=1.0)
    assert model.step(training, 2, network).exposed == pytest.approx(100 / 1024 / 4)
    # four processes: 0.1465 s move, 2/3 of 0.1 s hide
    exposed = 1.5 * 100 / 1024 - 0.1 * 2 / 3
    assert model.step(training, 4, network).exposed == pytest.approx(exposed)
    assert model.step(training, 1, network).exposed == 0


def test_more_than_the_loaders_make_is_waited_for(module):
    model = module("scaling_model")
    training = model.Training(PARAMETERS, 32, MEASURED, loader_rate=50)
    network = model.Network(2.0**40, 0.0, overlap=1.0)
    found = model.step(training, 1, network)
    assert found.data_wait == pytest.approx(32 / 50 - 0.34)
    assert found.seconds == pytest.approx(32 / 50)


def test_volume_of_a_process_approaches_twice_the_gradients(module):
    model = module("scaling_model")
    assert model.sent_bytes(PARAMETERS, 1) == 0
    assert model.sent_bytes(PARAMETERS, 2) == 4 * PARAMETERS
    assert model.sent_bytes(PARAMETERS, 256) == pytest.approx(2 * 4 * PARAMETERS, rel=0.01)


def test_steps_between_and_beyond_the_measured_ones(module):
    model = module("scaling_model")
    assert model.interpolated(MEASURED, 12) == pytest.approx(0.14)
    assert model.interpolated(MEASURED, 64) == pytest.approx(0.68)
    assert model.interpolated(MEASURED, 1) == 0.1, "a GPU that is not busy is not faster"


def test_batch_that_does_not_divide_is_refused(module):
    model = module("scaling_model")
    training = model.Training(PARAMETERS, 32, MEASURED)
    with pytest.raises(ValueError, match="must be a multiple of 64 processes"):
        model.step(training, 64, model.Network(1e9, 0.0, 1.0))


def test_files_and_folders_of_the_store_are_those_on_the_disk(module, debug_run):
    store = debug_run.folder / "cache" / "features.zarr"
    cache = FeatureCache(store)
    ranks = {name: 1 + len(cache.slice_shape(name)) for name in (*cache.names, *OWN)}
    predicted = module("scaling_model").Store(ranks, cache.slices_per_shard)
    below = [path for path in store.rglob("*") if "c" in path.relative_to(store).parts[:-1]]
    assert predicted.num_shards(len(cache)) == cache.num_shards
    assert predicted.num_files(len(cache)) == sum(path.is_file() for path in below)
    assert predicted.num_folders(len(cache)) == sum(path.is_dir() for path in below)


def test_calls_are_sorted_by_what_they_touch(module):
    """Lines of strace: relative to a folder's descriptor, halves of a call, and an import."""
    lines = [
        '12 openat(AT_FDCWD</home>, "/r/debug/cache/features.zarr/gm/c/0", O_RDONLY) = 3',
        '12 unlinkat(5</r/debug/train-cam/checkpoints/.step.partial>, "task", 0) = 0',
        '12 rename("/r/debug/cache/.DONE.partial", "/r/debug/cache/DONE") = 0',
        "12 fsync(4</r/debug/train-cam/checkpoints/step/task>) = 0",
        '12 newfstatat(AT_FDCWD</r/debug>, "/usr/lib/os.py", 0x7ff, 0) = 0',
        "12 <... openat resumed>) = 3",
        "12 +++ exited with 0 +++",
    ]
    files = module("scaling_files")
    assert files.sort_calls(lines, Path("/r")) == {
        ("store", "open"): 1,
        ("checkpoints", "remove"): 1,
        ("checkpoints", "sync"): 1,
        ("run folder", "rename"): 1,
        ("outside", "stat"): 1,
    }


def test_calls_of_a_command_are_counted(module, tmp_path):
    files = module("scaling_files")
    if not files.can_count() or subprocess.run(["strace", "true"], capture_output=True).returncode:
        pytest.skip("strace cannot be used here")
    code = (
        "import os, sys; f = open(sys.argv[1], 'w'); f.flush(); os.fsync(f); os.mkdir(sys.argv[2])"
    )
    words = [str(tmp_path / "run" / "checkpoints"), str(tmp_path / "run" / "folder")]
    (tmp_path / "run").mkdir()
    counts = files.count_calls(
        [sys.executable, "-c", code, *words], tmp_path / "run", tmp_path / "log", {}
    )
    assert counts["checkpoints", "open"] == counts["checkpoints", "sync"] == 1
    in_run = {kind: count for (place, kind), count in counts.items() if place == "run folder"}
    assert in_run == {"make folder": 1}
    assert counts["outside", "open"] > 20, "Python's imports"


def test_predictions_come_from_measured_rows(module, tmp_path):
    rows = [
        {"config": "configs/debug.yaml", "device": "GPU", "stage": stage, "batch_size": batch}
        | {"unit_ms": milliseconds, "slices_per_second": 1000 * batch / milliseconds}
        for stage, batch, milliseconds in (
            ("train-diffusion", 4, 40.0),
            ("train-diffusion", 1, 20.0),
            ("cache", 8, 100.0),
        )
    ]
    path = tmp_path / "stages.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = module("scaling_table").predictions(["configs/debug.yaml"], path)
    assert "configs/debug.yaml on GPU" in table
    assert "| 1 | 4 | 4 | 40 ms (0 exposed) | 1.00 | 40 ms (0 exposed) | 1.00 |" in table
    assert "| 8 | 4 | does not divide | | | | |" in table
    # 48.1 kB a slice: a test of bench_stages has it
    assert "| cache writes | 80 | 3.85 MB/s | 30.8 MB/s | 246 MB/s | 986 MB/s |" in table
    assert "has no rows of" in module("scaling_table").predictions(["configs/demo.yaml"], path)


@pytest.mark.slow
def test_check_and_loader_run_at_tiny_size_and_append_their_rows(tmp_path, command):
    output = tmp_path / "scaling.csv"
    words = ("--parts", "check", "loader", "--tiny", "--nets", "debug", "--steps=2", "--rounds=1")
    command("bench_scaling", *words, "--folder", str(tmp_path), "--output", str(output))
    with output.open() as file:
        rows = list(csv.DictReader(file))
    two = [row for row in rows if row["what"] == "fit" and row["processes"] == "2"]
    assert [row["batch_size"] for row in two] == ["4", "8"]
    for row in two:
        for name in ("median_ms", "min_ms", "cpu_ms"):
            error = float(row[f"predicted_{name}"]) / float(row[name]) - 1
            assert float(row[f"error_{name}"]) == pytest.approx(error, rel=0.02, abs=0.01)
    assert {"all-reduce alone", "checkpoint"} <= {row["what"] for row in rows}
    assert float(rows[-1]["slices_per_second"]) > 0
    assert str(tmp_path) not in output.read_text()
    assert list(tmp_path.iterdir()) == [output], "what was written is removed"
