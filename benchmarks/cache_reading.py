"""Times of writing and reading a cache in several formats, in alternating rounds."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cache_formats import MEMMAP, OURS, Array, Format, Opened, Sizes, formats
from measure import alternate, cpu_and_wall, folder_bytes, medians
from reading import COLD, WARM, Reader, measure_readers

NUM_PIXELS = 64
SLICE, PIXELS, INTERPOLATED = "random slice", "64 random pixels", "64 interpolated pixels"
PASSES = {SLICE: 1, PIXELS: 5, INTERPOLATED: 5}  # over the slices, a round; first touch: one


def measure(folder: Path, sizes: Sizes, rounds: int) -> Iterator[dict[str, Any]]:
    """The columns of each row: writing (at most three rounds), then each way of reading, warm
    and, where pages can be dropped from memory, cold."""
    forms, values = formats(), sizes.values()
    yield from _writing(forms, folder, values, sizes, min(rounds, 3))
    stores = _write_stores(forms, folder, values, sizes)
    for measure in PASSES:
        for state in (COLD, WARM):
            yield from _reading(forms, stores, sizes, measure, state, rounds)


def _writing(
    forms: list[Format], folder: Path, values: Array, sizes: Sizes, rounds: int
) -> Iterator[dict[str, Any]]:
    """Each format writes all slices to the disk, fsync included, in a folder of its own."""
    target = folder / "written"

    def write(form: Format) -> tuple[float, float, int]:
        target.mkdir()
        cpu, wall = cpu_and_wall(lambda: _write_synced(form, target, values, sizes))
        num_bytes = folder_bytes(target)
        shutil.rmtree(target)
        return cpu, wall, num_bytes

    found = alternate({form.name: partial(write, form) for form in forms}, rounds)
    times = {name: medians(laps) for name, laps in found.items()}
    for name, (cpu, wall, num_bytes) in times.items():
        yield {
            "measure": "write",
            "implementation": name,
            "pages": WARM,
            "rounds": rounds,
            "ratio": cpu / times[MEMMAP][0],
            **_per_slice(sizes, cpu, wall, num_bytes),
        }


def _reading(
    forms: list[Format],
    stores: dict[str, Path],
    sizes: Sizes,
    measure: str,
    state: str,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Stores are opened anew in each round. np.memmap's is first, and to it all are compared.

    It and ours are read, where pages are warm, both touched (read once before the clock starts,
    so that pages are mapped and checksums verified) and not.
    """
    readers, passes = [], {}
    for form in forms:
        name, is_mapped = form.name, form.name in (MEMMAP, OURS)
        if measure == INTERPOLATED and not is_mapped:
            continue
        contestants = []
        if state == WARM:
            contestants.append((f"{name}, verified chunks" if name == OURS else name, True))
        if state == COLD or is_mapped:
            contestants.append((f"{name}, first touch" if is_mapped else name, False))
        for contestant, is_touched in contestants:
            passes[contestant] = PASSES[measure] if is_touched else 1
            start = _starter(form, stores[name], sizes, measure, passes[contestant], is_touched)
            files = [path for path in sorted(stores[name].rglob("*")) if path.is_file()]
            readers.append(Reader(contestant, files, start))
    times = measure_readers(readers, (state,), rounds)[state]
    for reader in readers:
        if reader.name in times:
            cpu, wall = (seconds / passes[reader.name] for seconds in times[reader.name])
            floor = times[readers[0].name][0] / passes[readers[0].name]
            yield {
                "measure": measure,
                "implementation": reader.name,
                "pages": state,
                "rounds": rounds,
                "ratio": cpu / floor,
                **_per_slice(sizes, cpu, wall, reader.num_bytes),
            }


def _per_slice(sizes: Sizes, cpu: float, wall: float, num_bytes: float) -> dict[str, float]:
    return {
        "slices": sizes.num_slices,
        "cpu_ms": 1000 * cpu / sizes.num_slices,
        "wall_ms": 1000 * wall / sizes.num_slices,
        "bytes_per_slice": num_bytes / sizes.num_slices,
    }


def _starter(
    form: Format, store: Path, sizes: Sizes, measure: str, passes: int, is_touched: bool
) -> Callable[[], Callable[[], int]]:
    """What opens the store, and gives what reads it."""
    draws = list(_draws(sizes, passes))
    places = [(row, (pixels // 2).T.copy()) for row, pixels in draws]

    def start() -> Callable[[], int]:
        opened = form.open(store, sizes)
        if is_touched:
            for row in range(sizes.num_slices):
                opened.read(row)
        if measure == SLICE:
            return lambda: sum(opened.read(row).size for row, _ in places)
        if measure == PIXELS:
            return lambda: sum(opened.pixels(row, y, x).size for row, (y, x) in places)
        interpolated = opened.interpolated
        assert interpolated is not None, "a format without it is not among the readers"
        return lambda: sum(interpolated(row, pixels).size for row, pixels in draws)

    return start


def _write_stores(
    forms: list[Format], folder: Path, values: Array, sizes: Sizes
) -> dict[str, Path]:
    """Folder of the store that each format reads; all of them give what was written."""
    stores = {form.name: folder / (form.reads or form.name) for form in forms}
    for form in forms:
        if not form.reads:
            stores[form.name].mkdir()
            form.write(stores[form.name], values, sizes)
    for form in forms:
        check(form.name, form.open(stores[form.name], sizes), values, sizes)
    return stores


def check(name: str, opened: Opened, values: Array, sizes: Sizes) -> None:
    """Raise RuntimeError where a format gives other numbers than it was given."""
    pixels = next(_draws(sizes, 1))[1]
    y, x = (pixels // 2).T
    for row, expected in enumerate(values):
        same = np.array_equal(opened.read(row), expected)
        if not same or not np.array_equal(opened.pixels(row, y, x), expected[:, y, x]):
            raise RuntimeError(f"{name} does not give the slice {row} that it was given")


def _draws(sizes: Sizes, passes: int) -> Iterator[tuple[int, Array]]:
    """Every row in random order, several times, with pixels (64, 2) of its image."""
    rng = np.random.default_rng(0)
    for _ in range(passes):
        for row in rng.permutation(sizes.num_slices):
            yield int(row), rng.integers(0, sizes.image_size, (NUM_PIXELS, 2))


def _write_synced(form: Format, folder: Path, values: Array, sizes: Sizes) -> None:
    """Write a store, and bring every file of it to the disk."""
    form.write(folder, values, sizes)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file)
