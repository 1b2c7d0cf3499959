"""Time and memory of dense decoding: upsample, concatenate, project against our order, in tiles.

From the taps of the diffusion model to score maps, for the nets of the demo, of BraTS and of
guided-diffusion's sizes, the large ones at 256x256; features and weights are random. Every order
gives the same scores. Alternating rounds, one thread, CPU time; on CUDA, the device's time. The
least work is said first. Peak memory is what a call holds at most above what was there before it,
its scores included: resident memory on CPU, allocated memory on CUDA. Rows are appended to
--output.

    OMP_NUM_THREADS=1 python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --device cuda --slices 4 --rounds 20
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import train_setup
from contrast_device import call_peak_mb, call_seconds, measure_ceilings
from decode_orders import Decoding, make_decoding, orders
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_results import Circumstances, append_rows, check_columns, circumstances
from train_setup import Case

RESULTS = Path(__file__).parent / "results" / "decode.csv"
PACKAGES = ("numpy", "torch", "monai")
CASES = (train_setup.DEMO, train_setup.BRATS_256, train_setup.GUIDED_DIFFUSION)
TILE_PIXELS = (4_096, 16_384, 65_536)
LARGEST_DIFFERENCE = 1e-4  # of scores in [0, 1], between two orders
COPIED_BYTES = 2**28


@dataclass(frozen=True)
class Row(Circumstances):
    """One line of the CSV; empty where nothing was measured. Times and work are per slice."""

    config: str
    implementation: str
    image_size: int  # pixels
    batch_size: int  # slices
    features: int  # of a pixel: noise levels times channels, over all taps
    hidden: int
    embedding: int
    rounds: int
    floor_gflop: float
    floor_mb: float  # features read once, scores written once
    floor_ms: float  # the longer of the two, at the rates measured in the same run
    gflop: float  # of the matrix products
    max_difference: float  # of scores, from the naive order's
    times_floor: float
    over_naive: float  # its time over ours, the median of the rounds
    peak_mb: float  # of the whole batch
    cpu_ms: float | None = None  # user and system; median of the rounds
    cpu_min_ms: float | None = None
    cpu_max_ms: float | None = None
    device_ms: float | None = None


@dataclass(frozen=True)
class Rates:
    """What the device does in a second."""

    flop: float  # of a large float32 matrix product
    bytes: float  # read and written, of a large copy

    def floor_seconds(self, work: Decoding) -> float:
        return max(work.floor_flop / self.flop, work.floor_bytes / self.bytes)


def main() -> None:
    """Measure every net in every order, print a table, append the rows."""
    arguments = _parse_arguments()
    try:
        check_columns(arguments.output, Row)
    except ValueError as error:
        sys.exit(f"bench_decode.py: {error}")
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    about = circumstances(device, script="bench_decode.py", packages=PACKAGES)
    print(f"{about.device}; {about.versions}")
    with train_setup.arithmetic(tf32=False), torch.no_grad():
        rates = _measure_rates(device, tiny=arguments.tiny)
        print(f"matrix product {rates.flop / 1e9:.4g} GFLOP/s, copy {rates.bytes / 1e9:.3g} GB/s")
        for case in [train_setup.DEBUG] if arguments.tiny else CASES:
            for row in _measure(case, arguments, about, rates):
                _print(row)
                append_rows(arguments.output, [row])
    print(f"\nrows appended to {arguments.output}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, default, what in (
        ("slices", 2, "decoded at once"),
        ("rounds", 5, "of which the median counts"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default %(default)s"
        )
    parser.add_argument("--tile-pixels", type=int, nargs="+", default=TILE_PIXELS, metavar="N")
    parser.add_argument("--tiny", action="store_true", help="the debug net: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    arguments = parser.parse_args()
    for name in ("slices", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(arguments, name)}")
    if min(arguments.tile_pixels) < 1:
        parser.error(f"--tile-pixels must be >= 1, got {min(arguments.tile_pixels)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return arguments


def _measure_rates(device: torch.device, *, tiny: bool) -> Rates:
    flop = measure_ceilings(device, tiny=tiny).flop["fp32"]
    source = torch.ones(COPIED_BYTES // (64 if tiny else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(call_seconds(device, lambda: target.copy_(source)) for _ in range(5))
    return Rates(flop, 2 * source.nbytes / seconds)


def _measure(
    case: Case, arguments: argparse.Namespace, about: Circumstances, rates: Rates
) -> Iterator[Row]:
    """The rows of one net; the first look at each order also counts and compares."""
    config, device = case.config(), torch.device(arguments.device)
    work = make_decoding(config, arguments.slices, device)
    floor_gflop, floor_mb = work.floor_flop / 1e9, work.floor_bytes / 1e6
    floor = rates.floor_seconds(work)
    print(
        f"\n{case.name}: {work.decoder.num_features} features a pixel\n"
        f"floor: {floor_gflop:.4g} GFLOP and {floor_mb:.4g} MB a slice, {1000 * floor:.4g} ms",
        flush=True,
    )
    calls = orders(work, list(arguments.tile_pixels))
    flop, differences = _compare(calls)
    seconds = _alternate(calls, device, arguments.rounds)
    naive = next(iter(seconds.values()))
    for name, found in seconds.items():
        milliseconds = [1000 * value / work.num_slices for value in found]
        yield Row(
            **asdict(about),
            config=case.name,
            implementation=name,
            image_size=work.side,
            batch_size=work.num_slices,
            features=work.decoder.num_features,
            hidden=config.decoder.hidden,
            embedding=config.decoder.embedding,
            rounds=arguments.rounds,
            floor_gflop=floor_gflop,
            floor_mb=floor_mb,
            floor_ms=1000 * floor,
            gflop=flop[name] / work.num_slices / 1e9,
            max_difference=differences[name],
            times_floor=statistics.median(milliseconds) / (1000 * floor),
            over_naive=statistics.median(n / own for n, own in zip(naive, found, strict=True)),
            peak_mb=call_peak_mb(device, calls[name]),
            **_times(device, milliseconds),
        )


def _times(device: torch.device, milliseconds: list[float]) -> dict[str, float]:
    median = statistics.median(milliseconds)
    if device.type == "cuda":
        return {"device_ms": median}
    return {"cpu_ms": median, "cpu_min_ms": min(milliseconds), "cpu_max_ms": max(milliseconds)}


def _compare(calls: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, int], dict[str, float]]:
    """FLOPs of each order, and how far its scores are from the first one's."""
    flop, differences = {}, {}
    expected = None
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            scores = call()
        flop[name] = counter.get_total_flops()
        expected = scores if expected is None else expected
        differences[name] = (scores - expected).abs().max().item()
        if not differences[name] <= LARGEST_DIFFERENCE:
            raise RuntimeError(f"{name} gives scores that differ by up to {differences[name]:.3g}")
    return flop, differences


def _alternate(
    calls: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each order, a round after the other; the first one is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            found = call_seconds(device, call)
            if number:
                seconds[name].append(found)
    return seconds


def _print(row: Row) -> None:
    milliseconds = row.device_ms if row.cpu_ms is None else row.cpu_ms
    print(
        f"{row.implementation:<32}{milliseconds:>10.4g} ms{row.times_floor:>8.3g} x floor"
        f"{row.over_naive:>8.3g} x as fast{row.peak_mb:>9.4g} MB{row.gflop:>8.4g} GFLOP",
        flush=True,
    )


if __name__ == "__main__":
    main()
