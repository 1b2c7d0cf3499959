"""The model for many GPUs, from measured rows of one: a table of steps, volumes and disks."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import scaling_model
from cases import Case, meta_net, num_channels, size_of
from scaling_model import Network, Store, Training

from cldf_dist.config import Config
from cldf_dist.inference.feature_extraction import bytes_per_slice, slice_shapes

GPUS = (1, 8, 64, 128, 256)
SLOW_DISK = 1e9  # bytes a second, that the main process writes a checkpoint with
# assumed, to bracket what clusters have: four fifths of the line rate, nodes of 8 GPUs with NVLink
GPUS_OF_NODE = 8
IN_NODE = Network(0.8 * 450e9, 10e-6, 1.0)
NETWORKS = {
    "200 Gbit/s a node": Network(0.8 * 25e9, 20e-6, 1.0),
    "8 x 400 Gbit/s": Network(0.8 * 400e9, 20e-6, 1.0),
}
WEAK_LOCAL_BATCH = 16


def predictions(files: Sequence[str], path: Path) -> str:
    """Markdown for the configuration, at every image size and on every device that was measured."""
    lines: list[str] = []
    for name, device, seconds, rates in _measured(files, path):
        config = Case(tuple(files), tuple(name.split()[len(files) :])).config()
        lines += [f"\n{name} on {device}\n", *_steps(config, seconds), *_disks(config, rates)]
    return "\n".join(lines) or f"{path} has no rows of {' '.join(files)}: run bench_stages.py"


def _steps(config: Config, seconds: dict[int, float]) -> Iterator[str]:
    parameters = round(size_of(config)["parameters"])
    measured = ", ".join(f"{batch}: {1000 * s:.4g} ms" for batch, s in sorted(seconds.items()))
    yield (
        f"Measured steps of one GPU, by slices: {measured}. {parameters / 1e6:.2f} M parameters: "
        f"each GPU sends {scaling_model.sent_bytes(parameters, 2) / 1e6:.0f} MB a step among 2, "
        f"{scaling_model.sent_bytes(parameters, 256) / 1e6:.0f} MB among 256; a checkpoint has "
        f"{scaling_model.checkpoint_bytes(parameters) / 1e9:.2f} GB."
    )
    columns = " | ".join(f"step, {name} | efficiency" for name in NETWORKS)
    yield f"\n| GPUs | batch | slices each | {columns} |"
    yield "|---|---|---|---|---|---|---|"
    for gpus in GPUS:
        yield _line(config, parameters, seconds, gpus, config.diffusion.fit.batch_size)
    for gpus in GPUS:
        yield _line(config, parameters, seconds, gpus, WEAK_LOCAL_BATCH * gpus)
    yield f"\n{_checkpoints(config, parameters, seconds)}"


def _line(config: Config, parameters: int, seconds: dict[int, float], gpus: int, batch: int) -> str:
    if batch % gpus:
        return f"| {gpus} | {batch} | does not divide | | | | |"
    training = Training(parameters, batch, seconds)
    cells = []
    for between_nodes in NETWORKS.values():
        network = IN_NODE if gpus <= GPUS_OF_NODE else between_nodes
        step = scaling_model.step(training, gpus, network)
        share = scaling_model.efficiency(training, gpus, network)
        cells.append(f"{1000 * step.seconds:.4g} ms ({1000 * step.exposed:.3g} exposed)")
        cells.append(f"{share:.2f}")
    return f"| {gpus} | {batch} | {batch // gpus} | {' | '.join(cells)} |"


def _checkpoints(config: Config, parameters: int, seconds: dict[int, float]) -> str:
    """What saving costs where steps are shortest."""
    fit, network = config.diffusion.fit, NETWORKS[next(iter(NETWORKS))]
    training = Training(parameters, fit.batch_size, seconds)
    gpus = max(number for number in GPUS if fit.batch_size % number == 0)
    step = scaling_model.step(training, gpus, network).seconds
    share = scaling_model.checkpoint_fraction(parameters, fit.checkpoint_every, step, SLOW_DISK)
    return (
        f"A checkpoint every {fit.checkpoint_every} steps at {SLOW_DISK / 1e9:g} GB/s takes "
        f"{share:.1%} of the time of {gpus} GPUs. All {fit.steps} steps: "
        f"{fit.steps * scaling_model.step(training, 1, network).seconds / 3600:.1f} h on one, "
        f"{fit.steps * step / 3600:.2f} h on {gpus}."
    )


def _disks(config: Config, rates: dict[str, float]) -> Iterator[str]:
    slice_bytes = 2 * num_channels(config) * config.data.image_size**2
    shapes = slice_shapes(meta_net(config), config)
    size = bytes_per_slice(shapes)
    ranks = {name: 1 + len(shape) for name, (shape, _) in shapes.items()} | {"key": 2, "done": 1}
    store = Store(ranks, config.cache.slices_per_shard)
    yield f"\nA prepared slice has {slice_bytes / 1e3:.0f} kB, a cached one {size / 1e6:.2f} MB."
    yield "\n| | slices/s of a GPU | 1 GPU | 8 | 64 | 256 |"
    yield "|---|---|---|---|---|---|"
    for stage, rate in rates.items():
        each = slice_bytes if stage.startswith("train") else size
        needed = " | ".join(_rate(gpus * rate * each) for gpus in (1, 8, 64, 256))
        does = "reads" if stage.startswith("train") else "writes"
        yield f"| {stage} {does} | {rate:.4g} | {needed} |"
    yield (
        f"\n100,000 cached slices: {store.num_files(100_000):,} files in "
        f"{store.num_folders(100_000):,} folders of {store.num_shards(100_000):,} shards."
    )


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second < 1e9:
        return f"{bytes_per_second / 1e6:.3g} MB/s"
    return f"{bytes_per_second / 1e9:.3g} GB/s"


def _measured(
    files: Sequence[str], path: Path
) -> Iterator[tuple[str, str, dict[int, float], dict[str, float]]]:
    """Of each configuration, image size and device: seconds of a step of the diffusion model by
    its slices, and slices a second of stages."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["config"].startswith(" ".join(files))]
    for name, device in dict.fromkeys((row["config"], row["device"]) for row in rows):
        mine = [row for row in rows if (row["config"], row["device"]) == (name, device)]
        seconds: dict[int, float] = {}
        rates: dict[str, float] = {}
        for row in mine:
            if row["stage"] == "train-diffusion":
                seconds.setdefault(int(row["batch_size"]), float(row["unit_ms"]) / 1000)
            if row["stage"] in ("train-diffusion", "cache"):
                rates.setdefault(row["stage"], float(row["slices_per_second"]))
        if seconds:
            yield name, device, seconds, rates
