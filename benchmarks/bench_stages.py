"""Time and memory of every stage that runs nets, and the hours that a configuration will take.

One process on one device, made-up slices in the configuration's shape, untrained nets: a step of
each training through `fit` with the configuration's own batch, in the fewest micro-batches that
fit (for the diffusion model also in micro-batches of 16, and steps of smaller batches, as one of
many processes takes them); a batch of the cache, read from shards
and brought to the host; steps of the decoder, with its loader; a batch of `segment`, for the row
cldf alone and for all. Times are by the clock on the wall, medians of rounds. Expected hours are
steps, or slices, times that: without `prepare`, `evaluate` and `report`, validation, checkpoints,
and waiting for disks. Rows are appended to --output.

    python benchmarks/bench_stages.py --config configs/brats.yaml
    python benchmarks/bench_stages.py --config configs/chaos_liver.yaml --train-slices 400
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import stage_work
import torch
import train_setup
from stage_pace import Plan, Speed
from stage_work import Training
from train_results import Circumstances, append_rows, check_columns, circumstances
from train_setup import Case

from cldf_dist.config import Config
from cldf_dist.inference.feature_extraction import bytes_per_slice, slice_shapes
from cldf_dist.method.features import features_dtype
from cldf_dist.system.distributed import accelerator
from cldf_dist.training.engine import autocast_dtype

RESULTS = Path(__file__).parent / "results" / "stages.csv"
PACKAGES = ("torch", "triton", "monai", "accelerate")
TRAININGS = (
    "train-diffusion",
    "tune-label-embedding",
    "train-classifier",
    "train-cam",
    "train-patch-classifier",
)
STAGES = (*TRAININGS, "cache", "train-decoder", "segment")
SMALL_MICRO_BATCH = 16
LOCAL_BATCHES = (1, 2, 4, 8, 16)  # slices of one step and process
# 60 % of the 1251 patients of BraTS-2021, about 130 slices each with more than a twentieth subject
BRATS_TRAIN_SLICES = 100_000


@dataclass(frozen=True)
class Row(Circumstances):
    """One line of the CSV; empty where it means nothing. A unit is a step, or a batch."""

    config: str
    stage: str
    what: str
    image_size: int  # pixels
    channels: int
    precision: str
    batch_size: int  # slices of a unit; decoder: of positive ones, each with a partner
    micro_batch: int
    rounds: int
    unit_ms: float  # median of the rounds
    unit_min_ms: float
    unit_max_ms: float
    slices_per_second: float
    peak_gb: float  # allocated on the GPU; on a CPU resident, all of the process
    parameters: int | None = None  # of what is trained
    cache_mb_per_slice: float | None = None
    units: int | None = None  # of the whole stage: steps, or batches of `train_slices` and the like
    train_slices: int | None = None  # that the hours are for
    hours: float | None = None  # of the whole stage, one process


def main() -> None:
    """Measure the stages that were asked for, print a table, append the rows."""
    arguments = _parse_arguments()
    try:
        check_columns(arguments.output, Row)
    except ValueError as error:
        sys.exit(f"bench_stages.py: {error}")
    device = accelerator().device
    if device.type == "cpu":
        torch.set_num_threads(1)
    about = circumstances(device, script="bench_stages.py", packages=PACKAGES)
    print(f"{about.device}; {about.versions}")
    plan = Plan(device, arguments.seconds, arguments.rounds)
    rows = []
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
        train_setup.arithmetic(),
    ):
        case, config = _configuration(arguments, folder)
        for row in _measure(case, config, plan, arguments, about, Path(folder)):
            _print(row)
            append_rows(arguments.output, [row])
            rows.append(row)
    _print_hours(rows)
    print(f"\nrows appended to {arguments.output}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", nargs="+", default=["configs/brats.yaml"], metavar="FILE")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="laid over them")
    parser.add_argument("--image-size", type=int, metavar="N", help="default: the configuration's")
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement, about")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts")
    parser.add_argument(
        "--local-batches",
        type=int,
        nargs="*",
        default=LOCAL_BATCHES,
        metavar="N",
        help="steps of the diffusion model with fewer slices; default %(default)s",
    )
    parser.add_argument("--workers", type=int, help="loaders of the decoder; default: its own")
    parser.add_argument("--cached-slices", type=int, default=16, help="in the decoder's store")
    parser.add_argument(
        "--train-slices",
        type=int,
        default=BRATS_TRAIN_SLICES,
        help="prepared slices of the training patients, for the hours; default %(default)s, about "
        "those of BraTS-2021",
    )
    parser.add_argument("--folder", type=Path, help="where stores are written, then removed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    arguments = parser.parse_args()
    for name in ("seconds", "rounds", "cached_slices", "train_slices"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be > 0, got {getattr(arguments, name)}")
    return arguments


def _configuration(arguments: argparse.Namespace, folder: str) -> tuple[Case, Config]:
    size = [f"data.image_size={arguments.image_size}"] if arguments.image_size else []
    case = Case(tuple(arguments.config), (*size, *arguments.set))
    return case, case.config(f"runs={folder}", "tracking.enabled=false")


def _measure(
    case: Case,
    config: Config,
    plan: Plan,
    arguments: argparse.Namespace,
    about: Circumstances,
    folder: Path,
) -> Iterator[Row]:
    """Stage by stage; what one held is freed before the next."""
    make_row = partial(_row, about, case, config, arguments.train_slices)
    for training in stage_work.trainings_of_slices(config):
        if training.stage in arguments.stages:
            for gradient_accumulation_steps, speed in _with_small_micro_batches(
                training, config, plan
            ):
                yield make_row(
                    training.stage,
                    speed,
                    gradient_accumulation_steps=gradient_accumulation_steps,
                    training=training,
                )
            if training.stage == "train-diffusion":
                yield from _local_batches(training, config, plan, arguments.local_batches, make_row)
    if "cache" in arguments.stages:
        speed = stage_work.measure_batch(
            partial(stage_work.cached_batch, config, folder / "slices"), plan
        )
        yield make_row("cache", speed)
    if "train-decoder" in arguments.stages:
        workers = arguments.workers
        workers = config.decoder.fit.num_workers if workers is None else workers
        training = stage_work.decoder_training(config, folder, arguments.cached_slices, workers)
        speed = training.measure(config, plan)
        yield make_row("train-decoder", speed, what=f"fit, {workers} loaders", training=training)
    if "segment" in arguments.stages:
        for what, rows in (("cldf", ("cldf",)), ("all rows", None)):
            speed = stage_work.measure_batch(
                partial(stage_work.segmented_batch, config, rows), plan
            )
            yield make_row("segment", speed, what=what)


def _with_small_micro_batches(
    training: Training, config: Config, plan: Plan
) -> Iterator[tuple[int, Speed]]:
    gradient_accumulation_steps, speed = training.measure_fitting(config, plan)
    yield gradient_accumulation_steps, speed
    batch = training.settings.batch_size
    if (
        training.stage == "train-diffusion"
        and batch // gradient_accumulation_steps > SMALL_MICRO_BATCH
    ):
        yield training.measure_fitting(config, plan, batch // SMALL_MICRO_BATCH)


def _local_batches(
    training: Training,
    config: Config,
    plan: Plan,
    local_batches: Sequence[int],
    make_row: Callable[..., Row],
) -> Iterator[Row]:
    """Whole steps, optimizer and all, of fewer slices than the batch: half the time for each."""
    plan = replace(plan, seconds=plan.seconds / 2)
    for batch in local_batches:
        if batch < training.settings.batch_size:
            local = replace(training, settings=replace(training.settings, batch_size=batch))
            row = make_row(
                training.stage,
                local.measure(config, plan),
                what=f"fit, local batch {batch}",
                training=local,
            )
            yield replace(row, units=None, train_slices=None, hours=None)


def _row(
    about: Circumstances,
    case: Case,
    config: Config,
    train_slices: int,
    stage: str,
    speed: Speed,
    *,
    what: str = "",
    gradient_accumulation_steps: int = 1,
    training: Training | None = None,
) -> Row:
    sizes = {"cache": config.cache.batch_size, "segment": config.segment.batch_size}
    batch = training.settings.batch_size if training else sizes[stage]
    units = _units(config, stage, train_slices, batch)
    task = training.make_task() if training else None
    return Row(
        **asdict(about),
        config=case.name,
        stage=stage,
        what=what or ("fit" if training else "one batch"),
        image_size=config.data.image_size,
        channels=stage_work.num_channels(config),
        precision=_precision(config, stage),
        batch_size=batch,
        micro_batch=batch // gradient_accumulation_steps,
        rounds=speed.num_rounds,
        unit_ms=1000 * speed.seconds,
        unit_min_ms=1000 * speed.fastest,
        unit_max_ms=1000 * speed.slowest,
        slices_per_second=batch / speed.seconds,
        peak_gb=speed.peak_gb,
        parameters=sum(p.numel() for p in task.parameters()) if task else None,
        cache_mb_per_slice=_cache_mb(config) if stage == "cache" else None,
        units=units,
        train_slices=train_slices,
        hours=units * speed.seconds / 3600,
    )


def _units(config: Config, stage: str, train_slices: int, batch: int) -> int:
    """Steps of a training; batches of the cache and of `segment`, by the shares of the patients."""
    steps = {
        "train-diffusion": config.diffusion.fit.steps,
        "tune-label-embedding": config.label_tuning.fit.steps,
        "train-classifier": config.classifier.fit.steps,
        "train-cam": config.cam.fit.steps,
        "train-patch-classifier": config.patch_classifier.fit.steps,
        "train-decoder": config.decoder.fit.steps * _num_decoders(config),
    }
    if stage in steps:
        return steps[stage]
    validation, test = config.data.validation_fraction, config.data.test_fraction
    share = {"cache": 1 - test, "segment": validation + test}[stage]
    return -(-round(train_slices * share / (1 - validation - test)) // batch)


def _num_decoders(config: Config) -> int:
    """Trainings of a decoder: cldf and cldf_plus, the control of the latter, and upper bounds."""
    plus = config.patch_classifier.enabled
    control = plus and config.plus.patch_tap and config.evaluate.controls
    return (1 + plus) * (2 if config.evaluate.upper_bound else 1) + control


def _precision(config: Config, stage: str) -> str:
    """Of the nets: fit's autocast, or that of the features alone; float32 or TF32 elsewhere."""
    device = accelerator().device
    single = "tf32" if device.type == "cuda" else "fp32"
    if stage in TRAININGS and stage != "tune-label-embedding":  # whose task runs without autocast
        dtype = autocast_dtype(config.mixed_precision, device)
        return str(dtype).removeprefix("torch.") if dtype else single
    if stage in ("tune-label-embedding", "train-decoder"):
        return single
    half = features_dtype(config.features, device) is torch.bfloat16
    return f"features bfloat16, else {single}" if half else single


def _cache_mb(config: Config) -> float:
    net = train_setup.meta_net(config)
    return bytes_per_slice(slice_shapes(net, config)) / 1e6


def _print(row: Row) -> None:
    print(
        "{stage:<17} {what:<19} micro-batch {micro_batch:>4}  {unit_ms:>9.1f} ms a unit "
        "({unit_min_ms:.1f} to {unit_max_ms:.1f}), {slices_per_second:>8.1f} slices/s, "
        "{peak_gb:>6.2f} GB".format(**asdict(row)),
        flush=True,
    )


def _print_hours(rows: list[Row]) -> None:
    if not rows:
        return
    first = rows[0]
    print(f"\n{first.config} at {first.image_size} pixels, one process of {first.device}:")
    rows = [row for row in rows if row.hours is not None]
    for row in rows:
        unit = "batches" if row.stage in ("cache", "segment") else "steps"
        print(
            f"  {row.stage:<17} {row.what:<19} {row.units:>7} {unit} of {row.batch_size:>4} "
            f"in micro-batches of {row.micro_batch:>4}: {row.hours:8.2f} h"
        )
    # of two rows of one training the first, the faster; of `segment` the last, with all rows
    chosen = {row.stage: row for row in reversed(rows)}
    chosen |= {row.stage: row for row in rows if row.stage == "segment"}
    total = sum(row.hours or 0.0 for row in chosen.values())
    print(f"  all of these: {total:.1f} h; slices: for {first.train_slices} of training patients")


if __name__ == "__main__":
    main()
