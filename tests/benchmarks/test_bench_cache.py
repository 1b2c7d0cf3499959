"""The benchmark of the cache runs at tiny size, and what it compares is the same."""

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

TINY = (
    *("--tiny", "--rounds=1", "--slices=6", "--side=8", "--channels=16"),
    *("--slices-per-shard=4", "--steps=2"),
)
INSTALLED = {name for name in ("h5py", "tensorstore") if importlib.util.find_spec(name)}
OTHERS = {"safetensors", "zarr-python", *INSTALLED}
MAPPED = {"np.memmap", "np.memmap, first touch", "ours, verified chunks", "ours, first touch"}
Command = Callable[..., None]
Module = Callable[[str], ModuleType]
Rows = list[dict[str, str]]


@pytest.mark.slow
def test_benchmark_runs_at_tiny_size_and_appends_its_rows(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cache.csv"
    command("bench_cache", *TINY, f"--output={output}", f"--folder={tmp_path}")
    printed = capsys.readouterr().out
    assert ("h5py: left out" in printed) == ("h5py" not in INSTALLED)
    rows = _read(output)
    assert {row["part"] for row in rows} == {"sizes", "read", "decoder"}
    for measure, expected in {
        "write": {"np.memmap", "ours"} | OTHERS,
        "random slice": MAPPED | OTHERS,
        "64 random pixels": MAPPED | OTHERS,
        "64 interpolated pixels": MAPPED,
    }.items():
        found = [row for row in rows if row["measure"] == measure and row["pages"] == "warm"]
        assert {row["implementation"] for row in found} == expected, measure
        floor = [row["ratio"] for row in found if row["implementation"] == "np.memmap"]
        assert floor == ["1"], measure
    assert str(tmp_path) not in output.read_text()
    assert list(tmp_path.iterdir()) == [output], "the stores are removed"
    _check_sizes([row for row in rows if row["part"] == "sizes"])
    _check_decoder([row for row in rows if row["part"] == "decoder"])


def _check_sizes(rows: Rows) -> None:
    """The least of the debug net: two taps, 16 channels at 16 x 16 and 8 at 32 x 32, one level."""
    assert [row["implementation"].split(",")[0] for row in rows] == ["float16"] * 2 + ["int8"] * 2
    for row in rows:
        assert float(row["least_bytes"]) == pytest.approx(2 * (16 * 256 + 8 * 1024), rel=1e-3)
        ratio = float(row["bytes_per_slice"]) / float(row["least_bytes"])
        assert ratio == pytest.approx(float(row["ratio"]), rel=1e-2)
        assert ratio > (0.5 if row["implementation"].startswith("int8") else 1)
        assert float(row["tb_per_100000_slices"]) == pytest.approx(
            float(row["mb_per_slice"]) / 10, rel=1e-3
        )


def _check_decoder(rows: Rows) -> None:
    assert [row["implementation"].split(",")[0] for row in rows] == [
        "pixels gathered in the loader",
        "pixels gathered in the loader",
        "naive full maps",
    ]
    assert all(0 < float(row["loader_fraction"]) < 1 for row in rows)
    assert all(float(row["steps_per_second"]) > 0 for row in rows)


def test_a_reader_that_gives_other_numbers_is_refused(tmp_path: Path, module: Module) -> None:
    formats, reading = module("cache_formats"), module("cache_reading")
    sizes = formats.Sizes(2, 1, 4, 3, 2)
    values = sizes.values()
    formats._write_memmap(tmp_path, values, sizes)
    opened = formats._open_memmap(tmp_path, sizes)
    reading.check("np.memmap", opened, values, sizes)
    other = np.where(np.arange(2)[:, None, None, None, None] == 1, values + 1, values)
    with pytest.raises(RuntimeError, match=r"np\.memmap does not give the slice 1"):
        reading.check("np.memmap", opened, other, sizes)


def test_a_wrong_option_is_refused(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("bench_cache", "--rounds=0")
    assert "--rounds: must be > 0, got 0" in capsys.readouterr().err


def _read(path: Path) -> Rows:
    with path.open() as file:
        return list(csv.DictReader(file))
