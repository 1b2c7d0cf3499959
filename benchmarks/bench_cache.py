"""The cache of features: its bytes, its readers against others, and the decoder trained from it.

Parts: bytes of a written store against the least that its features take (sizes); writing, a random
slice and 64 random pixels of one, against np.memmap, h5py, safetensors, zarr-python and tensorstore
(read); steps of the decoder with pixels gathered in the loader, against whole maps upsampled
(decoder). One process, one thread, alternating rounds, medians; warm, and cold as far as
posix_fadvise drops pages from memory: the disk's own memory is not emptied. Rows are appended to
--output.

    OMP_NUM_THREADS=1 python benchmarks/bench_cache.py
    OMP_NUM_THREADS=1 python benchmarks/bench_cache.py --parts read --rounds 9
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cache_decoder
import numpy as np
import torch
import train_setup
from cache_formats import Sizes, formats
from cache_reading import measure_reading, measure_writing
from train_results import Circumstances, append_rows, check_columns, circumstances
from train_setup import Case

from cldf_dist.data.features.encoding import STORAGES
from cldf_dist.data.features.store import SCALE, FeatureCache
from cldf_dist.inference.feature_extraction import slice_shapes

RESULTS = Path(__file__).parent / "results" / "cache.csv"
PACKAGES = ("numpy", "torch", "zarr", "h5py", "safetensors", "tensorstore", "google-crc32c")
PARTS = ("sizes", "read", "decoder")
NETS = (train_setup.SMALL, train_setup.BRATS, train_setup.GUIDED_DIFFUSION)
# the small net's decoder on slices of 256 x 256: the naive form holds whole maps of a step
DECODER = Case(
    train_setup.SMALL.files,
    (
        "data.image_size=256",
        "decoder.fit.batch_size=4",
        "decoder.contrast.object_pixels=256",
        "decoder.contrast.background_pixels=384",
    ),
)
TINY_DECODER = Case(train_setup.DEBUG.files)


@dataclass(frozen=True)
class Row(Circumstances):
    """One line of the CSV; empty where nothing was measured."""

    part: str
    config: str  # of the net, or the shape of a slice: levels x height x width x channels
    measure: str
    implementation: str
    pages: str = ""  # cold or warm
    slices: int | None = None
    rounds: int | None = None
    cpu_ms: float | None = None  # user and system: a slice's, or a step's
    wall_ms: float | None = None
    ratio: float | None = None  # of bytes to the least, or of CPU time to np.memmap or naive form
    bytes_per_slice: float | None = None  # on the disk
    least_bytes: float | None = None  # sum over taps of C h w x 2 x stored noise levels
    mb_per_slice: float | None = None  # 1e6 bytes
    tb_per_100000_slices: float | None = None
    steps_per_second: float | None = None
    loader_fraction: float | None = None  # of the wall time of a step


def main() -> None:
    """Measure the parts that were asked for, print and append their rows."""
    arguments = _parse_arguments()
    try:
        check_columns(arguments.output, Row)
    except ValueError as error:
        sys.exit(f"bench_cache.py: {error}")
    torch.set_num_threads(1)
    about = circumstances(torch.device("cpu"), script="bench_cache.py", packages=PACKAGES)
    print(f"{about.device}; {about.versions}")
    measure: dict[str, Callable[..., Iterator[Row]]] = {
        "sizes": _sizes,
        "read": _read,
        "decoder": _decoder,
    }
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for row in measure[part](arguments, about, Path(folder)):
                _print(row)
                append_rows(arguments.output, [row])
    print(f"\nrows appended to {arguments.output}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    for name, default, what in (
        ("rounds", 7, "of which the median counts; writing and the decoder have at most 3"),
        ("slices", 96, "of the readers' store"),
        ("levels", 1, "noise levels of a slice"),
        ("side", 64, "of a slice's map"),
        ("channels", 240, "of a slice"),
        ("slices-per-shard", 16, "of all stores"),
        ("steps", 20, "of the decoder, a round"),
        ("naive-steps", 1, "of the decoder with whole maps, a round"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default %(default)s"
        )
    parser.add_argument("--tiny", action="store_true", help="the debug net: does it run?")
    parser.add_argument("--folder", type=Path, help="where stores are written, then removed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if type(value) is int and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    return arguments


def _sizes(arguments: argparse.Namespace, about: Circumstances, folder: Path) -> Iterator[Row]:
    """Bytes of the features alone, and of the store with its maps, seeds, keys and checksums."""
    for case in [train_setup.DEBUG] if arguments.tiny else NETS:
        for storage in STORAGES:
            config = case.config(f"features.storage={storage}")
            shapes = slice_shapes(train_setup.meta_net(config), config)
            count, taps = arguments.slices_per_shard, config.features.taps
            least = sum(2 * int(np.prod(shapes[tap][0])) for tap in taps)
            _write_zeros(folder / "store", shapes, count)
            arrays = [name for tap in taps for name in (tap, tap + SCALE) if name in shapes]
            parts = {
                f"{storage}, features alone": [folder / "store" / name for name in arrays],
                f"{storage}, with maps, seeds, keys": [folder / "store"],
            }
            for name, folders in parts.items():
                stored = sum(map(_num_bytes, folders)) / count
                yield Row(
                    **asdict(about),
                    part="sizes",
                    config=case.name,
                    measure="stored bytes",
                    implementation=name,
                    slices=count,
                    ratio=stored / least,
                    bytes_per_slice=stored,
                    least_bytes=float(least),
                    mb_per_slice=stored / 1e6,
                    tb_per_100000_slices=stored * 1e5 / 1e12,
                )
            shutil.rmtree(folder / "store")


def _write_zeros(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]], num_slices: int
) -> None:
    """A store of one shard: its bytes do not depend on what is in it."""
    cache = FeatureCache.create(
        folder, num_slices, shapes, slices_per_shard=num_slices, attributes={}
    )
    zeros = {name: np.zeros((num_slices, *shape), kind) for name, (shape, kind) in shapes.items()}
    cache.write_shard(0, [f"slice_{row}" for row in range(num_slices)], zeros)


def _read(arguments: argparse.Namespace, about: Circumstances, folder: Path) -> Iterator[Row]:
    sizes = Sizes(
        arguments.slices,
        arguments.levels,
        arguments.side,
        arguments.channels,
        arguments.slices_per_shard,
    )
    forms, rounds = formats(), arguments.rounds
    written = min(rounds, 3)
    timings = [(written, timing) for timing in measure_writing(forms, folder, sizes, written)]
    timings += [(rounds, timing) for timing in measure_reading(forms, folder, sizes, rounds)]
    for rounds, timing in timings:
        yield Row(
            **asdict(about),
            part="read",
            config="x".join(map(str, sizes.shape)),
            measure=timing.measure,
            implementation=timing.implementation,
            pages=timing.pages,
            slices=sizes.num_slices,
            rounds=rounds,
            cpu_ms=timing.cpu_ms,
            wall_ms=timing.wall_ms,
            ratio=timing.ratio_to_memmap,
            bytes_per_slice=float(timing.file_bytes),
        )


def _decoder(arguments: argparse.Namespace, about: Circumstances, folder: Path) -> Iterator[Row]:
    case = TINY_DECODER if arguments.tiny else DECODER
    config, rounds = case.config(), min(arguments.rounds, 3)
    cache = cache_decoder.write_store(config, folder / "store", num_slices=8)
    found = cache_decoder.measure(
        config, cache, arguments.steps, arguments.naive_steps, rounds=rounds
    )
    for name, speed in found.items():
        yield Row(
            **asdict(about),
            part="decoder",
            config=case.name,
            measure="optimizer step",
            implementation=name,
            pages="warm",
            slices=len(cache),
            rounds=rounds,
            cpu_ms=speed.cpu_ms,
            wall_ms=speed.wall_ms,
            ratio=speed.cpu_ms / found[cache_decoder.NAIVE].cpu_ms,
            steps_per_second=speed.steps_per_second,
            loader_fraction=speed.loader_fraction,
        )


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _print(row: Row) -> None:
    """The names, then every number that there is, under its column's name."""
    values: dict[str, Any] = asdict(row)
    shown = [f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float)]
    what = " ".join(filter(None, (row.measure, row.pages)))
    print(f"{row.config}: {what}: {row.implementation}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
