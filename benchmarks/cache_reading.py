"""Times of writing and reading a cache in several formats, in alternating rounds."""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cache_formats import MEMMAP, OURS, Array, Format, Opened, Sizes, sync_files
from stream_readers import COLD, WARM, Reader

NUM_PIXELS = 64
SLICE, PIXELS, INTERPOLATED = "random slice", "64 random pixels", "64 interpolated pixels"
MEASURES = (SLICE, PIXELS, INTERPOLATED)
PASSES = {SLICE: 1, PIXELS: 5, INTERPOLATED: 5}  # over the slices, a round; first touch: one


@dataclass(frozen=True)
class Timing:
    """Medians of the rounds, per slice."""

    measure: str
    implementation: str
    pages: str  # cold or warm
    cpu_ms: float  # user and system, of all threads
    wall_ms: float
    ratio_to_memmap: float  # of CPU time
    file_bytes: int  # per slice


def measure_writing(forms: list[Format], folder: Path, sizes: Sizes, rounds: int) -> list[Timing]:
    """Each format writes all slices to the disk, fsync included, in a folder of its own."""
    values = sizes.values()
    taken: dict[str, list[tuple[float, float]]] = {form.name: [] for form in forms}
    num_bytes = {}
    for _ in range(rounds):
        for form in forms:
            target = folder / "written"
            target.mkdir()
            wall, cpu = time.perf_counter(), time.process_time()
            form.write(target, values, sizes)
            sync_files(target)
            taken[form.name].append((time.process_time() - cpu, time.perf_counter() - wall))
            num_bytes[form.name] = sum(path.stat().st_size for path in _files(target))
            shutil.rmtree(target)
    medians = {name: [statistics.median(part) for part in zip(*taken[name])] for name in taken}
    return [
        Timing(
            "write",
            name,
            WARM,
            cpu_ms=1000 * cpu / sizes.num_slices,
            wall_ms=1000 * wall / sizes.num_slices,
            ratio_to_memmap=cpu / medians[MEMMAP][0],
            file_bytes=round(num_bytes[name] / sizes.num_slices),
        )
        for name, (cpu, wall) in medians.items()
    ]


def measure_reading(forms: list[Format], folder: Path, sizes: Sizes, rounds: int) -> list[Timing]:
    """Every measure, warm and, where pages can be dropped from memory, cold."""
    stores = _write_stores(forms, folder, sizes)
    timings = []
    for measure in MEASURES:
        for state in (COLD, WARM):
            plans = _plans(forms, measure, state)
            readers = [
                Reader(p.name, _files(stores[p.form.name]), p.starter(stores[p.form.name], sizes))
                for p in plans
            ]
            if not _run(readers, state, rounds):
                print(f"{measure}, {state}: left out, pages cannot be dropped from memory")
                continue
            floor = readers[0].medians(state)[0] / plans[0].passes
            for plan, reader in zip(plans, readers, strict=True):
                cpu, wall = (seconds / plan.passes for seconds in reader.medians(state))
                timings.append(
                    Timing(
                        measure,
                        plan.name,
                        state,
                        cpu_ms=1000 * cpu / sizes.num_slices,
                        wall_ms=1000 * wall / sizes.num_slices,
                        ratio_to_memmap=cpu / floor,
                        file_bytes=round(reader.num_bytes / sizes.num_slices),
                    )
                )
    return timings


@dataclass(frozen=True)
class Plan:
    """One reader of one measure: opened anew in each round, and where `is_touched` read once
    before the clock starts, so that pages are mapped and checksums verified."""

    form: Format
    name: str
    measure: str
    is_touched: bool

    @property
    def passes(self) -> int:
        """Over the slices, in a round."""
        return PASSES[self.measure] if self.is_touched else 1

    def starter(self, store: Path, sizes: Sizes) -> Callable[[], Callable[[], int]]:
        """What opens the store, and gives what reads it."""
        draws = list(_draws(sizes, self.passes))
        places = [(row, (pixels // 2).T.copy()) for row, pixels in draws]

        def start() -> Callable[[], int]:
            opened = self.form.open(store, sizes)
            if self.is_touched:
                for row in range(sizes.num_slices):
                    opened.read(row)
            if self.measure == SLICE:
                return lambda: sum(opened.read(row).size for row, _ in places)
            if self.measure == PIXELS:
                return lambda: sum(opened.pixels(row, y, x).size for row, (y, x) in places)
            interpolated = opened.interpolated
            assert interpolated is not None, "a format without it has no such plan"
            return lambda: sum(interpolated(row, pixels).size for row, pixels in draws)

        return start


def _plans(forms: list[Format], measure: str, state: str) -> list[Plan]:
    """np.memmap's first; it and ours are read both touched and not where pages are warm."""
    plans = []
    for form in forms:
        name, is_mapped = form.name, form.name in (MEMMAP, OURS)
        if measure == INTERPOLATED and not is_mapped:
            continue
        if state == WARM:
            verified = f"{name}, verified chunks" if name == OURS else name
            plans.append(Plan(form, verified, measure, is_touched=True))
        if state == COLD or is_mapped:
            first = f"{name}, first touch" if is_mapped else name
            plans.append(Plan(form, first, measure, is_touched=False))
    return plans


def _write_stores(forms: list[Format], folder: Path, sizes: Sizes) -> dict[str, Path]:
    """Folder of the store that each format reads; all of them give what was written."""
    values, stores = sizes.values(), {}
    for form in forms:
        if not form.reads:
            stores[form.name] = folder / form.name
            stores[form.name].mkdir()
            form.write(stores[form.name], values, sizes)
    for form in forms:
        stores[form.name] = stores[form.reads or form.name]
        _check(form.name, form.open(stores[form.name], sizes), values, sizes)
    return stores


def _check(name: str, opened: Opened, values: Array, sizes: Sizes) -> None:
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


def _run(readers: list[Reader], state: str, rounds: int) -> bool:
    """Fill the readers' seconds; False where their pages cannot be dropped."""
    for reader in readers:
        reader.start()()  # every cache of the libraries filled
    for _ in range(rounds):
        for reader in readers:
            if state == COLD and not reader.forget_pages():
                return False
            reader.measure(state)
    return True


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
