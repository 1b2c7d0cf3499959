"""The rules that a configuration must keep, each with value, rule and remedy.

Those of the data and of trainings; the rules of the method lie in method_rules.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from cldf_dist.config import EACH, Config, Data, Fit, flatten
from cldf_dist.method_rules import method_rules

DATASETS = ("brats", "chaos", "dicom", "nnunet", "phantom")
BRATS_OBJECTS = ("whole_tumour", "tumour_core", "enhancing_tumour")
CHAOS_OBJECTS = {
    "ct": ("liver",),
    "mr_t1": ("liver", "right_kidney", "left_kidney", "spleen"),
    "mr_t2": ("liver", "right_kidney", "left_kidney", "spleen"),
}
SUBJECTS = ("auto", "nonzero", "tissue")
PRECISIONS = ("auto", "fp16", "bf16", "tf32", "fp32")
ATTENTION = ("sdpa", "xformers", "auto")
LAYOUTS = ("auto", "always", "never")
COMBINATIONS = ("stack", "average")
CAM_LAYERS = ("layer1", "layer2", "layer3", "layer4")
PHANTOM_MINIMA = {"num_patients": 3, "num_slices": 4, "grid_size": 16, "seed": 0}
COUNTS = (
    "gradient_map.num_noise_samples", "features.num_noise_samples", "saliency.num_noise_samples", "cache.batch_size",
    "cache.slices_per_shard", "cache.verify_processes", "segment.batch_size",
    "segment.tile_pixels", "evaluate.resamples",
    "report.slices_per_patient", "decoder.hidden", "decoder.embedding", "decoder.prototype_pixels",
    "decoder.prototypes_per_class",
    "diffusion.num_timesteps", "data.min_object_pixels", "data.slices_per_shard",
    "label_tuning.compared_slices", "patch_classifier.channels", "patch_classifier.layers",
    "patch_classifier.downsample",
)  # fmt: skip
FITTED = ("diffusion", "label_tuning", "classifier", "cam", "patch_classifier", "decoder")
LARGEST_IMAGE = 4096  # pixels: what is larger is a slip of the keyboard


def broken_rules(config: Config) -> list[str]:
    """One sentence for each rule that the configuration breaks."""
    broken = [
        *_choices(config),
        *_counts(config),
        *_data(config),
        *_object(config),
        *method_rules(config),
    ]
    for section in FITTED:
        broken += _fit(f"{section}.fit", getattr(config, section).fit)
    return broken


def _choices(config: Config) -> Iterator[str]:
    contrast = config.decoder.contrast
    for path, value, choices in (
        ("mixed_precision", config.mixed_precision, ("auto", "no", "bf16", "fp16")),
        ("data.dataset", config.data.dataset, DATASETS),
        ("data.subject", config.data.subject, SUBJECTS),
        ("data.on_damaged", config.data.on_damaged, ("error", "skip")),
        ("diffusion.schedule", config.diffusion.schedule, ("cosine", "linear")),
        ("diffusion.prediction", config.diffusion.prediction, ("v_prediction", "epsilon")),
        ("diffusion.net.attention", config.diffusion.net.attention, ATTENTION),
        ("features.condition", config.features.condition, ("object", "no_object", "none")),
        ("features.precision", config.features.precision, ("auto", "fp32", "bf16")),
        ("features.noise", config.features.noise, ("drawn", "none")),
        ("features.combine_timesteps", config.features.combine_timesteps, COMBINATIONS),
        ("features.combine_noise_samples", config.features.combine_noise_samples, COMBINATIONS),
        ("features.storage", config.features.storage, ("float16", "int8")),
        ("cache.compression", config.cache.compression, ("none", "zstd")),
        ("seeds.rule", config.seeds.rule, ("both", "cam", "gradient")),
        ("decoder.loss", config.decoder.loss, ("contrastive", "cross_entropy")),
        ("decoder.contrast.backend", contrast.backend, ("auto", "triton", "torch")),
        ("decoder.contrast.precision", contrast.precision, PRECISIONS),
        ("cam.layer", config.cam.layer, CAM_LAYERS),
        ("seeds.cam", config.seeds.cam, ("auto", "gradcam", "gradcam_pp", "layercam")),
        ("segment.mask_method", config.segment.mask_method, ("auto", "cldf", "cldf_plus")),
    ):
        if value not in choices:
            yield f"{path} must be one of {', '.join(choices)}, got {value!r}"


def _counts(config: Config) -> Iterator[str]:
    flat = flatten(config)
    for path in COUNTS:
        if flat[path] < 1:
            yield f"{path} must be >= 1, got {flat[path]}"
    if config.data.dataset == "phantom":
        for name, low in PHANTOM_MINIMA.items():
            value = getattr(config.data.phantom, name)
            if value < low:
                yield f"data.phantom.{name} must be >= {low}, got {value}"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if any(part in ("", ".", "..") for part in config.name.split("/")) or "\\" in config.name:
        yield f"name must be a plain folder name, got {config.name!r}"
    if data.dataset != "phantom" and not data.root and not data.shards and not config.input:
        yield f"data.root must name the folder of the {data.dataset} data; add data.root=FOLDER"
    yield from _shards(data)
    levels = len(config.diffusion.net.channels)
    depth = 2 ** max(levels - 1, 0)
    if data.image_size < 16 or data.image_size % depth:
        yield (
            f"data.image_size must be at least 16 and a multiple of {depth} (the U-Net halves it "
            f"{levels - 1} times), got {data.image_size}"
        )
    if data.image_size > LARGEST_IMAGE:
        yield f"data.image_size must be at most {LARGEST_IMAGE}, got {data.image_size}"
    if data.window and (len(data.window) != 2 or data.window[0] >= data.window[1]):
        yield f"data.window must be empty or (low, high) with low < high, got {list(data.window)}"
    if data.clip_low >= data.clip_high:
        yield f"data.clip_low must be < data.clip_high, got {data.clip_low} and {data.clip_high}"
    if data.validation_fraction <= 0 or data.test_fraction <= 0:
        yield "data.validation_fraction and data.test_fraction must be > 0"
    elif data.validation_fraction + data.test_fraction >= 1:
        yield "data.validation_fraction + data.test_fraction must stay below 1"


def _shards(data: Data) -> Iterator[str]:
    """The rules of shards that were prepared elsewhere."""
    if not data.shard_cache_gb > 0:
        yield f"data.shard_cache_gb must be > 0, got {data.shard_cache_gb}"
    if not data.shards:
        return
    if "://" not in data.shards:
        yield f"data.shards must be a URL, such as s3://bucket/x or file:///x, got {data.shards!r}"
    if data.object == EACH or "," in data.object:
        yield (
            "data.shards holds the slices of one object; make a run for each, "
            f"got data.object={data.object!r}"
        )
    if data.labels:
        yield f"data.labels: data.shards come with their labels; leave it out, got {data.labels!r}"


def _object(config: Config) -> Iterator[str]:
    """The rules of data.object that need no look at the data."""
    data = config.data
    names = data.object.split(",") if data.object not in ("", EACH) else []
    parts = [part for name in names for part in name.strip().split("+")]
    known: tuple[str, ...] | None = None  # only the data know
    if data.dataset == "brats":
        known = BRATS_OBJECTS
    elif data.dataset == "phantom":
        known = ("lesion",)
    elif data.dataset == "chaos":
        if data.modality not in CHAOS_OBJECTS:
            choices = ", ".join(CHAOS_OBJECTS)
            yield f"data.modality must be one of {choices}, got {data.modality!r}"
            return
        known = CHAOS_OBJECTS[data.modality]
    for part in parts:
        if known is not None and part not in known:
            yield (
                f"data.object must be of {', '.join(known)} for data.dataset={data.dataset}"
                + (f" and data.modality={data.modality}" if data.dataset == "chaos" else "")
                + f", joined by + for one object or by a comma for several; got {part!r}"
            )
    if len(set(parts)) != len(parts) or not all(parts):
        yield f"data.object must name different objects, got {data.object!r}"
    if data.labels and data.dataset not in ("nnunet", "dicom"):
        yield (
            f"data.labels is for data.dataset=nnunet and dicom; {data.dataset} has its labels from "
            f"its masks: leave it out, got {data.labels!r}"
        )
    if data.dataset == "dicom" and not (data.labels or data.shards or config.input):
        yield "data.labels must name the CSV file of labels for data.dataset=dicom"


def _fit(path: str, fit: Fit) -> Iterator[str]:
    if fit.channels_last not in LAYOUTS:
        yield f"{path}.channels_last must be one of {', '.join(LAYOUTS)}, got {fit.channels_last!r}"
    for name in (
        "steps",
        "batch_size",
        "gradient_accumulation_steps",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
    ):
        if getattr(fit, name) < 1:
            yield f"{path}.{name} must be >= 1, got {getattr(fit, name)}"
    if fit.learning_rate <= 0:
        yield f"{path}.learning_rate must be > 0, got {fit.learning_rate}"
    if not 0 <= fit.ema_decay < 1:
        yield f"{path}.ema_decay must lie in [0, 1), got {fit.ema_decay}"
    for name in ("warmup_steps", "weight_decay", "clip_norm", "num_workers", "validate_every"):
        if getattr(fit, name) < 0:
            yield f"{path}.{name} must be >= 0, got {getattr(fit, name)}"
    if fit.validate_every > 0 and fit.validation_samples < 1:
        yield (
            f"{path}.validation_samples must be >= 1 where {path}.validate_every is not 0, "
            f"got {fit.validation_samples}"
        )
