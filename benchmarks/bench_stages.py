"""Time and memory of every stage that runs nets, and the hours that a configuration will take.

One process on one device, made-up slices in the configuration's shape, untrained nets: a step of
each training through `fit` with the configuration's own batch, in the fewest micro-batches that
fit (for the diffusion model also in micro-batches of 16, and steps of smaller batches, as one of
many processes takes them); a batch of the cache, read from shards and brought to the host; steps
of the decoder, with its loader; a batch of `segment`, for the method cldf alone and for all. Times
are by the clock on the wall, medians of rounds. Expected hours are steps, or slices, times that:
without `prepare`, `evaluate` and `report`, validation, checkpoints, and waiting for disks. Rows are
appended to --output.

    python benchmarks/bench_stages.py --config configs/brats.yaml
    python benchmarks/bench_stages.py --config configs/chaos_liver.yaml --train-slices 400
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import stage_work
from cases import DIFFUSION, Case, arithmetic, meta_net, num_channels
from harness import ABOUT, Benchmark
from measure import reset_peak
from stage_work import SECTIONS, Plan, Speed, Training, measure_call

from cldf_dist.config import Config
from cldf_dist.inference.feature_extraction import bytes_per_slice, slice_shapes
from cldf_dist.method.features import features_dtype
from cldf_dist.system.distributed import accelerator
from cldf_dist.training.engine import autocast_dtype

# a unit is a step, or a batch
COLUMNS = (
    *ABOUT,
    *("config", "stage", "what", "image_size", "channels", "precision"),
    "batch_size",  # slices of a unit; decoder: of positive ones, each with a partner
    *("micro_batch", "rounds"),
    *("unit_ms", "unit_min_ms", "unit_max_ms"),  # median of the rounds
    "slices_per_second",
    "peak_gb",  # allocated on the GPU; on a CPU resident, all of the process
    *("parameters", "cache_mb_per_slice"),  # of what is trained
    *("units", "train_slices", "hours"),  # of the whole stage in one process, for so many slices
)
STAGES = (*SECTIONS, "cache", "train-decoder", "segment")
SMALL_MICRO_BATCH = 16
LOCAL_BATCHES = (1, 2, 4, 8, 16)  # slices of one step and process
# 60 % of the 1251 patients of BraTS-2021, about 130 slices each with more than a twentieth subject
BRATS_TRAIN_SLICES = 100_000


@dataclass(frozen=True)
class Measured:
    """One measurement of a stage."""

    stage: str
    what: str
    speed: Speed
    batch_size: int
    num_micro_batches: int = 1
    training: Training | None = None
    is_whole: bool = True  # hours of the stage follow from it


def main() -> None:
    """Measure the stages that were asked for, append the rows, print the hours."""
    bench = Benchmark(__file__, __doc__, COLUMNS, ("torch", "triton", "monai", "accelerate"))
    arguments = _parse(bench)
    bench.begin(accelerator().device)
    plan = Plan(bench.device, arguments.seconds, arguments.rounds)
    size = [f"data.image_size={arguments.image_size}"] if arguments.image_size else []
    case = Case(tuple(arguments.config), (*size, *arguments.set))
    with bench.folder() as folder, arithmetic():
        config = case.config_in(folder)
        rows = [
            bench.add(config=case.name, **_columns(config, one, arguments.train_slices))
            for one in _measure(config, plan, arguments, folder)
        ]
    _print_hours(rows)


def _parse(bench: Benchmark) -> argparse.Namespace:
    bench.option("--config", nargs="+", default=["configs/brats.yaml"], metavar="FILE")
    bench.option("--set", nargs="+", default=[], metavar="KEY=VALUE", help="laid over them")
    bench.option("--image-size", type=int, metavar="N", help="default: the configuration's")
    bench.option("--stages", choices=STAGES, nargs="+", default=list(STAGES))
    bench.option("--workers", type=int, help="loaders of the decoder; default: its own")
    bench.numbers(float, seconds=(8.0, "of each measurement, about"))
    bench.numbers(
        rounds=(5, "of which the median counts"),
        cached_slices=(16, "in the decoder's store"),
        train_slices=(
            BRATS_TRAIN_SLICES,
            "prepared slices of the training patients, for the hours, about those of BraTS-2021",
        ),
    )
    bench.option(
        "--local-batches",
        type=int,
        nargs="*",
        default=LOCAL_BATCHES,
        metavar="N",
        help="steps of the diffusion model with fewer slices; default %(default)s",
    )
    bench.shared_options("folder")
    return bench.parse()


def _measure(
    config: Config, plan: Plan, arguments: argparse.Namespace, folder: Path
) -> Iterator[Measured]:
    """Stage by stage; what one held is freed before the next."""
    for training in stage_work.trainings_of_slices(config):
        if training.stage in arguments.stages:
            yield from _trained(training, config, plan, arguments.local_batches)
    if "cache" in arguments.stages:
        make = partial(stage_work.cached_batch, config, folder / "slices")
        yield Measured("cache", "one batch", _batch(make, plan), config.cache.batch_size)
    if "train-decoder" in arguments.stages:
        workers = arguments.workers
        workers = config.decoder.fit.num_workers if workers is None else workers
        training = stage_work.decoder_training(config, folder, arguments.cached_slices, workers)
        speed, size = training.measure(config, plan), training.settings.batch_size
        what = f"fit, {workers} loaders"
        yield Measured("train-decoder", what, speed, size, training=training)
    if "segment" in arguments.stages:
        for what, methods in (("cldf", ("cldf",)), ("all rows", None)):
            make = partial(stage_work.segmented_batch, config, methods)
            yield Measured("segment", what, _batch(make, plan), config.segment.batch_size)


def _trained(
    training: Training, config: Config, plan: Plan, local_batches: list[int]
) -> Iterator[Measured]:
    """The whole batch; of the diffusion model also small micro-batches, and whole steps, optimizer
    and all, of fewer slices than the batch: half the time for each."""
    size = training.settings.batch_size
    make = partial(Measured, training.stage, training=training)
    number, speed = training.measure_fitting(config, plan)
    yield make("fit", speed, size, number)
    if training.stage != DIFFUSION:
        return
    if size // number > SMALL_MICRO_BATCH:
        number, speed = training.measure_fitting(config, plan, size // SMALL_MICRO_BATCH)
        yield make("fit", speed, size, number)
    plan = replace(plan, seconds=plan.seconds / 2)
    for batch in (batch for batch in local_batches if batch < size):
        local = replace(training, settings=replace(training.settings, batch_size=batch))
        speed = local.measure(config, plan)
        yield make(f"fit, local batch {batch}", speed, batch, is_whole=False)


def _batch(make: Callable[[], Callable[[], object]], plan: Plan) -> Speed:
    """One batch; its nets are made after those of earlier stages are gone."""
    reset_peak(plan.device)
    return measure_call(make(), plan)


def _columns(config: Config, one: Measured, train_slices: int) -> dict[str, Any]:
    speed, task = one.speed, one.training.make_task() if one.training else None
    columns: dict[str, Any] = {
        "stage": one.stage,
        "what": one.what,
        "image_size": config.data.image_size,
        "channels": num_channels(config),
        "precision": _precision(config, one.stage),
        "batch_size": one.batch_size,
        "micro_batch": one.batch_size // one.num_micro_batches,
        "rounds": speed.num_rounds,
        "unit_ms": 1000 * speed.seconds,
        "unit_min_ms": 1000 * speed.fastest,
        "unit_max_ms": 1000 * speed.slowest,
        "slices_per_second": one.batch_size / speed.seconds,
        "peak_gb": speed.peak_gb,
        "parameters": sum(p.numel() for p in task.parameters()) if task else None,
    }
    if one.stage == "cache":
        shapes = slice_shapes(meta_net(config), config)
        columns["cache_mb_per_slice"] = bytes_per_slice(shapes) / 1e6
    if one.is_whole:
        units = _units(config, one.stage, train_slices, one.batch_size)
        hours = units * speed.seconds / 3600
        columns |= {"units": units, "train_slices": train_slices, "hours": hours}
    return columns


def _units(config: Config, stage: str, train_slices: int, batch: int) -> int:
    """Steps of a training; batches of the cache and of `segment`, by the fractions of patients."""
    if stage in SECTIONS:
        steps: int = getattr(config, SECTIONS[stage]).fit.steps
        return steps
    if stage == "train-decoder":  # cldf and cldf_plus, the control of the latter, upper bounds
        plus = config.patch_classifier.enabled
        control = plus and config.plus.patch_tap and config.evaluate.controls
        decoders = (1 + plus) * (2 if config.evaluate.upper_bound else 1) + control
        return config.decoder.fit.steps * decoders
    validation, test = config.data.validation_fraction, config.data.test_fraction
    fraction = 1 - test if stage == "cache" else validation + test
    return -(-round(train_slices * fraction / (1 - validation - test)) // batch)


def _precision(config: Config, stage: str) -> str:
    """Of the nets: fit's autocast, or that of the features alone; float32 or TF32 elsewhere."""
    device = accelerator().device
    single = "tf32" if device.type == "cuda" else "fp32"
    if stage in ("tune-label-embedding", "train-decoder"):  # tasks that run without autocast
        return single
    if stage in SECTIONS:
        dtype = autocast_dtype(config.mixed_precision, device)
        return str(dtype).removeprefix("torch.") if dtype else single
    half = features_dtype(config.features, device) is not None
    return f"features bfloat16, else {single}" if half else single


def _print_hours(rows: list[dict[str, Any]]) -> None:
    whole = [row for row in rows if "hours" in row]
    if not whole:
        return
    first = whole[0]
    print(f"\n{first['config']} at {first['image_size']} pixels, one process of {first['device']}:")
    for row in whole:
        print(
            "  {stage:<22} {what:<19} {units:>7} units of {batch_size:>4} in micro-batches of "
            "{micro_batch:>4}: {hours:8.2f} h".format(**row)
        )
    # of two rows of one training the first, the faster; of `segment` the last, with all rows
    chosen = {row["stage"]: row for row in reversed(whole)}
    chosen |= {row["stage"]: row for row in whole if row["stage"] == "segment"}
    total = sum(row["hours"] for row in chosen.values())
    print(f"  all of these: {total:.1f} h, for {first['train_slices']} slices of training patients")


if __name__ == "__main__":
    main()
