"""Every knob of the pipeline, with its one default, its unit and where the number comes from.

Provenance of the constants: only the abstract of the CLDF paper (arXiv 2506.23460) is public, so
each number below is our choice; where one rests on a measurement, `docs/log.md` holds it.
This module imports no torch, so that `cldf --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cldf_dist.config_types import build

CLASSES = ("no object", "object")
UNCONDITIONAL = len(CLASSES)  # the class index that stands for "no label given"


EACH = "each"  # of the data set's objects


@dataclass(frozen=True)
class Phantom:
    """The synthetic data set: what `data.dataset=phantom` generates."""

    num_patients: int = 44
    num_slices: int = 24
    grid_size: int = 64  # pixels, in-plane
    seed: int = 0


@dataclass(frozen=True)
class Data:
    dataset: str = "brats"  # brats | chaos | dicom | nnunet | phantom
    root: str = ""  # folder of the native data set; unused by the phantom
    # what is segmented: a name that the data set knows, or several joined by "+" into one object
    # (right_kidney+left_kidney); empty: the data set's usual or only one. Names with commas
    # between them (liver,spleen), or "each": one run per object, see joint.py
    object: str = ""
    modality: str = "mr_t1"  # chaos only: mr_t1 (in and out of phase) | mr_t2 | ct
    # CSV file of slice or volume labels, for nnunet and dicom; a relative path like that of splits
    labels: str = ""
    # JSON file {"train": [patient, ...], "validation": ..., "test": ...}; a relative path is meant
    # from the folder of the YAML file that holds it, on the command line from the working folder
    splits: str = ""
    validation_fraction: float = 0.15  # of the patients, where no splits file is given
    test_fraction: float = 0.25  # of the patients, where no splits file is given
    split_seed: int = 0
    image_size: int = 128  # pixels; slices are cropped to the subject and resampled to a square
    min_object_pixels: int = 50  # in-plane pixels of the original scan that make a slice positive
    min_body_fraction: float = 0.05  # of the square; emptier slices are not used
    subject: str = "auto"  # auto | nonzero | tissue: how the subject is told from the air
    # (low, high) of the stored values, mapped to [-1, 1] in place of the robust standardisation;
    # empty: the abdominal window for CT, the robust standardisation for everything else
    window: tuple[float, ...] = ()
    clip_low: float = -3.5  # robust standard deviations from the median that map to -1
    clip_high: float = 5.5  # robust standard deviations from the median that map to +1
    slices_per_shard: int = 256
    on_damaged: str = "error"  # error | skip: what to do with a slice whose checksum is wrong
    # URL (s3://, gs://, https://, file:// ...) of a `prepare` folder made elsewhere, to be used as
    # it is; then data.root is not needed
    shards: str = ""
    # where the shards of that URL are staged, one folder per node, best a disk of its own; empty:
    # cldf-shards-<user number> in $TMPDIR or /tmp
    shard_cache: str = ""
    shard_cache_gb: float = 50.0  # 1e9 bytes; it holds no more, the least recently used go first
    phantom: Phantom = field(default_factory=Phantom)


@dataclass(frozen=True)
class Augment:
    """Random changes of a training slice; a function of (seed, sample number) alone."""

    flip: bool = True  # left-right; switch off where sides differ (abdomen)
    rotate_degrees: float = 10.0  # uniform in +- this
    scale: float = 0.08  # uniform relative change of size in +- this
    shift: float = 0.03  # uniform shift in +- this, as a share of the image size
    intensity: float = 0.05  # standard deviation of the channel-wise gain
    probability: float = 0.8  # of the affine and intensity part


@dataclass(frozen=True)
class Fit:
    """One training. Steps are optimizer steps; `batch_size` is global, over all processes."""

    steps: int = 10_000
    batch_size: int = 32
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step and process
    learning_rate: float = 2e-4
    warmup_steps: int = 200
    final_learning_rate_fraction: float = 0.05  # share of `learning_rate` at the end of the cosine
    weight_decay: float = 1e-4
    clip_norm: float = 1.0  # gradient norm; 0 switches clipping off
    ema_decay: float = 0.999  # of the moving average of the weights; 0 switches it off
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2  # checkpoints
    validate_every: int = 500  # steps; 0 switches validation off
    validation_samples: int = 128
    preview_every: int = 0  # steps; 0 only at the end
    log_every: int = 10  # steps
    num_workers: int = 0  # loader processes per rank
    compile: bool = False  # torch.compile of the net
    channels_last: str = "auto"  # auto | always | never: the layout; auto: on CPUs, without ZeRO
    # weights to begin with: a .safetensors file, the folder of a finished training, or one of its
    # checkpoints; a relative path is meant from the working folder. Empty: random weights
    start_from: str = ""
    max_skipped_steps: int = 20  # non-finite steps in a row before the training stops


@dataclass(frozen=True)
class UNet:
    channels: tuple[int, ...] = (64, 128, 256, 256)  # per level, finest first
    num_res_blocks: int = 2  # per level
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    num_head_channels: int = 32
    norm_num_groups: int = 16
    # sdpa | xformers | auto (xformers where it runs): of the training; later stages take sdpa
    attention: str = "sdpa"
    gradient_checkpointing: bool = False  # less memory in training, for one more forward pass


@dataclass(frozen=True)
class Diffusion:
    """The class-conditional diffusion model (CDM)."""

    net: UNet = field(default_factory=UNet)
    num_timesteps: int = 1000
    schedule: str = "cosine"  # cosine | linear
    prediction: str = "v_prediction"  # v_prediction | epsilon
    min_snr_gamma: float = 5.0  # loss weight min(SNR, gamma); Hang et al. 2023; 0 switches it off
    label_dropout: float = 0.1  # share of samples trained without a label
    augment: Augment = field(default_factory=Augment)
    fit: Fit = field(default_factory=Fit)


@dataclass(frozen=True)
class LabelTuning:
    """The CDM's label embedding alone, trained on until a wrong label predicts the noise worse."""

    enabled: bool = True  # false leaves the embedding as `train-diffusion` made it
    timestep_range: tuple[int, int] = (
        200,
        450,
    )  # timesteps: lowest, and the first that is too high
    # validation slices by whose labels the better of the two embeddings is kept
    compared_slices: int = 128
    augment: Augment = field(default_factory=Augment)
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=200,
            batch_size=16,
            learning_rate=6e-2,
            warmup_steps=10,
            weight_decay=0.0,
            ema_decay=0.95,
            checkpoint_every=100,
            validate_every=100,
        )
    )


@dataclass(frozen=True)
class Classifier:
    """The external classifier: it sees noised slices, its gradient is the gradient map."""

    channels: tuple[int, ...] = (32, 64, 96, 128)
    num_res_blocks: int = 1
    attention_levels: tuple[bool, ...] = (False, False, False, False)  # it blurs the gradient
    num_head_channels: int = 32
    norm_num_groups: int = 16
    dropout: float = 0.1  # before the linear layer
    max_timestep: int = 300  # timestep; training noise is drawn below it
    clean_fraction: float = 0.3  # of the training samples get no noise
    label_smoothing: float = 0.02
    augment: Augment = field(default_factory=Augment)
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=3000, learning_rate=5e-4, weight_decay=0.05, ema_decay=0.99
        )
    )


@dataclass(frozen=True)
class Cam:
    """The clean classifier behind the class activation maps."""

    channels: tuple[int, ...] = (32, 64, 128, 256)  # of the four ResNet stages
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    layer: str = "layer2"  # whose activations make the maps; finer layers localise better
    dropout: float = 0.1
    label_smoothing: float = 0.02
    augment: Augment = field(default_factory=Augment)
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=3000, learning_rate=5e-4, weight_decay=0.05, ema_decay=0.99
        )
    )


@dataclass(frozen=True)
class PatchClassifier:
    """The classifier of small windows, whose evidence makes the seeds of `cldf_plus`."""

    enabled: bool = True  # false leaves out the rows patch_classifier and cldf_plus
    channels: int = 32
    layers: int = 4  # 3x3 convolutions: a pixel's evidence depends on 2 layers + 1 pixels
    downsample: int = 1  # pixels of the slice per pixel of the net, in each direction
    pooled_fraction: float = 0.02  # of the subject's pixels, the highest, make the slice's logit
    dropout: float = 0.2  # of whole channels, before the linear layer
    label_smoothing: float = 0.0
    augment: Augment = field(default_factory=Augment)
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=3000, learning_rate=2e-3, weight_decay=0.05, ema_decay=0.99
        )
    )


@dataclass(frozen=True)
class GradientMap:
    timesteps: tuple[int, ...] = (50, 100, 150, 200, 250)  # timesteps
    num_noise_samples: int = 2  # of the noise, per noise level
    smooth_pixels: float = 1.0  # standard deviation of the Gaussian, in prepared pixels


@dataclass(frozen=True)
class Features:
    """Which activations of the frozen CDM are the diffusion features."""

    taps: tuple[str, ...] = ("up1.1", "up2.1", "up3.1")  # decoder level . resnet, coarse first
    timesteps: tuple[int, ...] = (50, 150, 300)  # timesteps
    # drawn | none: what is added to the slice; none: it is only scaled as at that noise level
    noise: str = "none"
    num_noise_samples: int = 1  # of the noise, at each noise level
    combine_timesteps: str = (
        "stack"  # stack | average: one feature map per noise level, or their mean
    )
    combine_noise_samples: str = "average"  # average | stack
    # auto | fp32 | bf16: of the CDM's passes, for the cache and for new scans; auto: bf16 on GPUs
    precision: str = "auto"
    # float16 | int8: as stored; int8 has a scale per slice and channel, and half the bytes
    storage: str = "float16"
    condition: str = "object"  # object | no_object | none: the label given to the CDM
    contrast: bool = False  # store features(object) - features(no object) beside them


@dataclass(frozen=True)
class Seeds:
    """Which pixels we dare to trust. Both maps are scaled to [0, 1] within the slice."""

    rule: str = "both"  # both | cam | gradient
    # auto | gradcam | gradcam_pp | layercam: which activation map; auto: the one that agrees best
    # with CDM saliency on positive training slices
    cam: str = "auto"
    object_threshold: float = 0.5  # a map above it speaks for the object
    background_threshold: float = 0.2  # a map below it speaks for background
    negative_slices: bool = True  # all body pixels of negative slices are background seeds


@dataclass(frozen=True)
class Plus:
    """`cldf_plus`: the same contrastive stage, from the seeds of the patch classifier."""

    # share of the subject's pixels of negative validation slices whose evidence may exceed the
    # threshold
    negative_fraction: float = 0.01
    # what exceeds the threshold in a positive slice is an object seed where the activation map,
    # scaled to [0, 1] within the slice, exceeds this; 0: the evidence alone decides
    cam_threshold: float = 0.3
    # least mean correlation of evidence and activation map on positive training slices, else the
    # row is left out: one of the two does not show the object; -1: it is not asked
    min_agreement: float = 0.2
    patch_tap: bool = True  # the patch classifier's activations are features too


@dataclass(frozen=True)
class Cache:
    slices_per_shard: int = 16  # every array is cut here: one file, one writer
    batch_size: int = 16  # slices per forward pass and process
    part: str = ""  # i/n: only this share of the slices, for one job of an array
    verify: bool = False  # look for damage, and make again what is damaged
    verify_processes: int = 4  # that read at once, per process of the launch
    compression: str = "none"  # none | zstd: smaller by a tenth, read at several times the CPU time


@dataclass(frozen=True)
class Contrast:
    temperature: float = 0.1
    object_pixels: int = 256  # per step, over all processes
    background_pixels: int = 384  # per step, over all processes; half from negative slices
    # share of a slice's background pixels that are drawn from its hardest: where the activation or
    # the gradient map, scaled within the slice, speaks most for the object; 0: drawn at random
    hard_negatives: float = 0.0
    hard_pool: float = 0.1  # share of a slice's background that counts as its hardest
    backend: str = "auto"  # auto | triton | torch: what computes the loss; auto: triton on a GPU
    precision: str = "auto"  # auto | fp16 | bf16 | tf32 | fp32: of the scores in Triton's kernels
    deterministic: bool = False  # bit-identical from run to run on a GPU too; costs some speed


@dataclass(frozen=True)
class Decoder:
    """The pixel decoder: a pointwise network from features to a unit-length embedding."""

    hidden: int = 64
    embedding: int = 16
    dropout: float = 0.5  # of the standardised features
    noise: float = 0.5  # standard deviation added to the standardised features
    prototype_pixels: int = 20_000  # training seeds per class behind its prototypes
    prototypes_per_class: int = 1  # 1: the mean direction; more: centres of spherical k-means
    loss: str = "contrastive"  # contrastive | cross_entropy, of a linear classifier, to compare
    contrast: Contrast = field(default_factory=Contrast)
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=300,
            learning_rate=2e-3,
            warmup_steps=20,
            weight_decay=0.05,
            ema_decay=0.98,
            checkpoint_every=100,
            validate_every=0,
        )
    )


@dataclass(frozen=True)
class Saliency:
    """CDM saliency by condition flip: |prediction(object) - prediction(no object)|."""

    timesteps: tuple[int, ...] = (250, 350)  # timesteps
    num_noise_samples: int = 2  # of the noise, per noise level
    smooth_pixels: float = 1.0


@dataclass(frozen=True)
class CgDiff:
    """CG-Diff: what a guided walk to "no object" and back changes (Wolleb et al., MICCAI 2022).

    A baseline of CDM-WSSS (Hu et al., MICCAI 2023). What is published where: docs/method.md.
    """

    enabled: bool = True  # false leaves the row out
    inversion: bool = True  # encode by DDIM, as Wolleb et al.; false: noise, as the CDM-WSSS code
    # chosen by slice labels of validation patients (docs/log.md); published: docs/method.md
    timestep: int = 250  # timestep
    steps: int = 20  # of DDIM, each way, evenly spaced; the published codes take every timestep
    scale: float = 100.0  # of the classifier's gradient; Wolleb et al.
    label_scale: float = 2.0  # of classifier-free guidance by "no object"; 1: the label alone
    smooth_pixels: float = 1.0


@dataclass(frozen=True)
class CgCdm:
    """CG-CDM: the denoised slice's derivative by its label (Hu et al., "CDM-WSSS")."""

    enabled: bool = True  # false leaves the row out
    # chosen by slice labels of validation patients (docs/log.md); published: docs/method.md
    timestep: int = 250  # timestep
    steps: int = 10  # adjacent DDIM steps
    scale: float = 0.1  # of the classifier's gradient. 0: their CDM, without a classifier
    tau: float = 0.0  # share of f(object) in the second label. 0: "no object" itself
    smooth_pixels: float = 1.0


@dataclass(frozen=True)
class Segment:
    batch_size: int = 16  # slices per forward pass and process
    tile_pixels: int = 16_384  # that a decoder embeds at a time, of one slice or several
    gate_probability: float = (
        0.5  # slices that the classifiers, on average, put below are emptied; 0: off
    )
    negative_fraction: float = (
        0.01  # headline rule: share of negative validation pixels above the threshold
    )
    min_component_ml: float = 0.0  # smaller components are removed, in every row alike
    # auto | cldf | cldf_plus: whose masks new scans and joint label maps get; auto: the one whose
    # areas tell the validation slices apart better (weak validation)
    mask_method: str = "auto"
    # only these rows are scored and evaluated, of those that the run has; empty: all
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluate:
    confidence: float = 0.95
    resamples: int = 10_000
    upper_bound: bool = True  # train and report `supervised_decoder` where training masks exist
    # train and report `raw_patches`, the same decoder on the slice itself, where features.taps has
    # an image tap beside those of the CDM
    controls: bool = True


@dataclass(frozen=True)
class Report:
    slices_per_patient: int = 3


@dataclass(frozen=True)
class Tracking:
    enabled: bool = True
    uri: str = ""  # empty: sqlite in the folder of runs
    experiment: str = "cldf"


@dataclass(frozen=True)
class RunSettings:
    heartbeat_seconds: float = 300.0  # silence of the main process that counts as its death


@dataclass(frozen=True)
class Config:
    name: str = ""  # of the run; default: the config files' stems joined by "-"
    runs: str = "runs"  # folder of all runs
    seed: int = 0
    mixed_precision: str = "auto"  # auto (bf16 on GPU) | no | bf16 | fp16 (GPUs older than sm_80)
    input: str = ""  # segment only: a new scan or a folder of scans
    output: str = ""  # segment only: where its masks go
    data: Data = field(default_factory=Data)
    diffusion: Diffusion = field(default_factory=Diffusion)
    label_tuning: LabelTuning = field(default_factory=LabelTuning)
    classifier: Classifier = field(default_factory=Classifier)
    cam: Cam = field(default_factory=Cam)
    patch_classifier: PatchClassifier = field(default_factory=PatchClassifier)
    gradient_map: GradientMap = field(default_factory=GradientMap)
    features: Features = field(default_factory=Features)
    seeds: Seeds = field(default_factory=Seeds)
    plus: Plus = field(default_factory=Plus)
    cache: Cache = field(default_factory=Cache)
    decoder: Decoder = field(default_factory=Decoder)
    saliency: Saliency = field(default_factory=Saliency)
    cg_diff: CgDiff = field(default_factory=CgDiff)
    cg_cdm: CgCdm = field(default_factory=CgCdm)
    segment: Segment = field(default_factory=Segment)
    evaluate: Evaluate = field(default_factory=Evaluate)
    report: Report = field(default_factory=Report)
    tracking: Tracking = field(default_factory=Tracking)
    run: RunSettings = field(default_factory=RunSettings)

    @property
    def run_folder(self) -> Path:
        return Path(self.runs) / self.name


def load(paths: Sequence[str], overrides: Sequence[str] = (), *, fit_section: str = "") -> Config:
    """The defaults, overlaid by the YAML files in order, then by `key=value` words; checked.

    `fit_section` (say `cam.fit`) is what a bare `fit.KEY=VALUE` on the command line means.
    Raises ValueError with the dotted path for an unknown key, a wrong type or a broken rule, and
    FileNotFoundError for a missing file.
    """
    from cldf_dist.config_files import merged_settings

    defaults = Config()
    sections = [name for name, part in vars(defaults).items() if dataclasses.is_dataclass(part)]
    merged = merged_settings(paths, overrides, fit_section, sections)
    config: Config = build(Config, merged, "")
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ValueError (key, value, rule) for settings that cannot work together."""
    from cldf_dist.config_rules import broken_rules

    broken = broken_rules(config)
    if broken:
        raise ValueError("; ".join(broken))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted path, the same in YAML, on the command line and in MLflow."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        path = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat


def to_yaml(config: Config) -> str:
    """The whole resolved configuration as YAML."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))


def to_plain(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts and lists, ready for JSON and YAML."""
    return {
        item.name: to_plain(value)
        if dataclasses.is_dataclass(value := getattr(config, item.name))
        else (list(value) if isinstance(value, tuple) else value)
        for item in dataclasses.fields(config)
    }


def from_plain(plain: dict[str, Any]) -> Config:
    """The configuration that `to_plain` wrote."""
    config: Config = build(Config, plain, "")
    return config


def build_section(section: type, plain: dict[str, Any]) -> Any:
    """One section (say `UNet`) from its plain form, with the same strictness as `load`."""
    return build(section, plain, f"{section.__name__}.")
