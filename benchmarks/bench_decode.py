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

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from cases import BRATS_256, DEBUG, DEMO, GUIDED_DIFFUSION, Case, arithmetic, meta_net
from harness import ABOUT, Benchmark, positive
from measure import alternate, matrix_product_flop, peaks_mb, seconds_of
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from cldf_dist.config import Config
from cldf_dist.inference.score_maps import prototype_scores
from cldf_dist.method.features import tap_shapes
from cldf_dist.method.prototypes import prototype_score
from cldf_dist.nets.decoder import PixelDecoder

# times and work are per slice, the peak is of the whole batch; features are those of a pixel:
# timesteps times channels, over all taps
COLUMNS = (
    *ABOUT,
    *("config", "implementation", "image_size", "batch_size", "features", "hidden", "embedding"),
    "rounds",
    *("floor_gflop", "floor_mb"),  # features read once, scores written once
    "floor_ms",  # the longer of the two, at the rates measured in the same run
    "gflop",  # of the matrix products
    "max_difference",  # of scores, from the naive order's
    "times_floor",
    "over_naive",  # its time over this one's, the median of the rounds
    "peak_mb",
    *("cpu_ms", "cpu_min_ms", "cpu_max_ms"),  # user and system; median of the rounds
    "device_ms",
)
TILE_PIXELS = (4_096, 16_384, 65_536)
LARGEST_DIFFERENCE = 1e-4  # of scores in [0, 1], between two orders
COPIED_BYTES = 2**28
Calls = Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Decoding:
    """A decoder with its prototypes (2, embedding), and made-up taps of some slices."""

    decoder: PixelDecoder
    prototypes: Tensor
    taps: Mapping[str, Tensor]  # (slices, channels, height, width)
    side: int  # of a slice, pixels

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def floor_flop(self) -> int:
        """Of one slice: the first layer at the taps' own resolutions, the others at each pixel.

        Upsampling, activations and the comparison with the prototypes are left out.
        """
        hidden, embedding = self.decoder.first.out_features, len(self.prototypes[0])
        first = sum(tap[0].numel() for tap in self.taps.values()) * hidden
        return 2 * (first + self.side**2 * hidden * (hidden + embedding))

    @property
    def floor_bytes(self) -> int:
        """Of one slice: each feature is read once, each score written once."""
        return sum(tap[0].nbytes for tap in self.taps.values()) + 4 * self.side**2


def main() -> None:
    """Measure every net in every order, append the rows."""
    bench = Benchmark(__file__, __doc__, COLUMNS, packages=("numpy", "torch", "monai"))
    bench.shared_options("device", "tiny")
    bench.numbers(slices=(2, "decoded at once"), rounds=(5, "of which the median counts"))
    bench.option("--tile-pixels", type=positive(int), nargs="+", default=TILE_PIXELS, metavar="N")
    arguments = bench.parse()
    bench.begin()
    with arithmetic(tf32=False), torch.no_grad():
        flop = matrix_product_flop(bench.device, "fp32", tiny=arguments.tiny)
        copied = _copied_bytes(bench.device, COPIED_BYTES // (64 if arguments.tiny else 1))
        print(f"matrix product {flop / 1e9:.4g} GFLOP/s, copy {copied / 1e9:.3g} GB/s")
        for case in [DEBUG] if arguments.tiny else [DEMO, BRATS_256, GUIDED_DIFFUSION]:
            _measure(bench, case, flop, copied)


def _measure(bench: Benchmark, case: Case, flop: float, copied: float) -> None:
    """The rows of one net; `flop` and `copied` bytes are those of a second."""
    arguments, config, device = bench.arguments, case.config(), bench.device
    count = arguments.slices
    work = make_decoding(config, count, device)
    floor_ms = 1000 * max(work.floor_flop / flop, work.floor_bytes / copied)
    floor = {
        "floor_gflop": work.floor_flop / 1e9,
        "floor_mb": work.floor_bytes / 1e6,
        "floor_ms": floor_ms,
    }
    print(f"\n{case.name}: {work.decoder.num_features} features a pixel")
    print(f"floor: {work.floor_flop / 1e9:.4g} GFLOP, {floor_ms:.4g} ms a slice", flush=True)
    calls = orders(work, arguments.tile_pixels)
    compared = compare(calls)
    timed = {name: partial(seconds_of, device, call) for name, call in calls.items()}
    found = {
        name: [1000 * seconds / count for (seconds,) in rounds]
        for name, rounds in alternate(timed, arguments.rounds, warmup=1).items()
    }
    naive = next(iter(found.values()))
    for name, milliseconds in found.items():
        median = statistics.median(milliseconds)
        cpu = {"cpu_ms": median, "cpu_min_ms": min(milliseconds), "cpu_max_ms": max(milliseconds)}
        flops, difference = compared[name]
        bench.add(
            config=case.name,
            implementation=name,
            image_size=work.side,
            batch_size=count,
            features=work.decoder.num_features,
            hidden=config.decoder.hidden,
            embedding=config.decoder.embedding,
            rounds=arguments.rounds,
            **floor,
            gflop=flops / count / 1e9,
            max_difference=difference,
            times_floor=median / floor_ms,
            over_naive=statistics.median(n / own for n, own in zip(naive, milliseconds)),
            peak_mb=peaks_mb(device, calls[name])[0],
            **({"device_ms": median} if device.type == "cuda" else cpu),
        )


def make_decoding(config: Config, num_slices: int, device: torch.device) -> Decoding:
    """What `segment` would decode with these settings; weights and features are random."""
    torch.manual_seed(0)
    side = config.data.image_size
    shapes = tap_shapes(meta_net(config), side, config.features, config.cam.channels)
    taps = {
        name: torch.randn(num_slices, levels * channels, height, width, device=device)
        for name, (levels, channels, height, width) in shapes.items()
    }
    channels = {name: tap.shape[1] for name, tap in taps.items()}
    decoder = PixelDecoder(channels, config.decoder.hidden, config.decoder.embedding)
    decoder.standardise(torch.randn(decoder.num_features), torch.rand(decoder.num_features) + 0.5)
    prototypes = functional.normalize(torch.randn(2, config.decoder.embedding), dim=1)
    return Decoding(decoder.to(device).eval(), prototypes.to(device), taps, side)


def orders(work: Decoding, tile_pixels: Sequence[int]) -> Calls:
    """Ways from the taps to score maps (slices, height, width), by name, the naive order first."""
    tiled = {
        f"ours, tiles of {pixels} pixels": partial(
            prototype_scores,
            work.decoder,
            work.prototypes,
            work.taps,
            work.size,
            tile_pixels=pixels,
        )
        for pixels in tile_pixels
    }
    naive, whole = partial(_naive, work), partial(_whole, work)
    return {"upsample, concatenate, project": naive, "ours, whole slices": whole, **tiled}


def compare(calls: Calls) -> dict[str, tuple[int, float]]:
    """FLOPs of each order, and how far its scores are from the first one's.

    Raises RuntimeError where they differ: times of other work are not compared.
    """
    found: dict[str, tuple[int, float]] = {}
    expected = None
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            scores = call()
        expected = scores if expected is None else expected
        difference = (scores - expected).abs().max().item()
        if not difference <= LARGEST_DIFFERENCE:
            raise RuntimeError(f"{name} gives scores that differ by up to {difference:.3g}")
        found[name] = counter.get_total_flops(), difference
    return found


def _naive(work: Decoding) -> Tensor:
    """Standardisation is folded into the first layer, as in ours: it would only cost more."""
    decoder = work.decoder
    upsampled = [
        functional.interpolate(work.taps[name], work.size, mode="bilinear", align_corners=False)
        for name in decoder.tap_channels
    ]
    weight = decoder.first.weight / decoder.std
    bias = decoder.first.bias - weight @ decoder.mean
    hidden = functional.conv2d(torch.cat(upsampled, dim=1), weight[:, :, None, None], bias)
    embedding = functional.normalize(decoder.rest(hidden.movedim(1, -1)), dim=-1)
    return prototype_score(embedding, work.prototypes)


def _whole(work: Decoding) -> Tensor:
    embedding = work.decoder.embed_maps(work.taps, work.size)
    return prototype_score(embedding.movedim(1, -1), work.prototypes)


def _copied_bytes(device: torch.device, count: int) -> float:
    """Bytes read and written in a second of a large copy."""
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_of(device, lambda: target.copy_(source))[0] for _ in range(5))
    return 2 * count / seconds


if __name__ == "__main__":
    main()
