"""Settings of what the frozen nets make: maps, features, seeds, scores and masks."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from cldf_dist.config.fields import (
    Count,
    FractionBelowOne,
    Mark,
    NonNegative,
    ProperFraction,
)

CamMethod = Literal["gradcam", "gradcam_pp", "layercam"]
Condition = Literal["object", "no_object", "none"]
Combination = Literal["stack", "average"]
SeedRule = Literal["both", "cam", "gradient"]


@dataclass(frozen=True)
class GradientMap:
    """The gradient map of the external classifier."""

    timesteps: tuple[int, ...] = (50, 100, 150, 200, 250)
    num_noise_samples: Count = 2  # per timestep
    smooth_pixels: NonNegative = 1.0  # standard deviation of the Gaussian, in prepared pixels


@dataclass(frozen=True)
class Features:
    """The activations of the frozen CDM that are the diffusion features."""

    taps: tuple[str, ...] = ("up1.1", "up2.1", "up3.1")  # decoder level . resnet, coarse first
    timesteps: tuple[int, ...] = (50, 150, 300)
    # what is added to the slice; none: it is only scaled as at that timestep
    noise: Literal["drawn", "none"] = "none"
    num_noise_samples: Count = 1  # at each timestep
    combine_timesteps: Combination = "stack"  # one feature map per timestep, or their mean
    combine_noise_samples: Combination = "average"
    # of the CDM's passes, for the cache and for new scans; auto: bf16 on GPUs
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # as stored; int8 has a scale per slice and channel, and half the bytes
    storage: Literal["float16", "int8"] = "float16"
    condition: Condition = "object"  # the label given to the CDM
    contrast: bool = False  # store features(object) - features(no object) beside them


@dataclass(frozen=True)
class Seeds:
    """Pixels with a confident pseudo-label. Both maps are scaled to [0, 1] within the slice."""

    rule: SeedRule = "both"
    # which activation map; auto: the one that agrees best with CDM saliency on positive training
    # slices
    cam: Literal["auto", CamMethod] = "auto"
    object_threshold: float = 0.5  # a map above it speaks for the object
    background_threshold: float = 0.2  # a map below it speaks for background
    negative_slices: bool = True  # all body pixels of negative slices are background seeds


@dataclass(frozen=True)
class Plus:
    """`cldf_plus`: the same contrastive stage, from the seeds of the patch classifier."""

    # of the body's pixels of negative validation slices: their patch logits may exceed the
    # threshold
    negative_fraction: ProperFraction = 0.01
    # what exceeds the threshold in a positive slice is an object seed where the activation map,
    # scaled to [0, 1] within the slice, exceeds this; 0: the patch logits alone decide
    cam_threshold: FractionBelowOne = 0.3
    # least mean correlation of patch probability and activation map on positive training slices,
    # else the method is left out: one of the two does not show the object; -1: it is not checked
    min_agreement: Annotated[float, Interval(ge=-1, lt=1)] = 0.2
    # the patch classifier's activations are features too
    patch_tap: Annotated[bool, Mark.DECIDES_CACHE] = True


@dataclass(frozen=True)
class Cache:
    """The feature cache: its shards, and the work of its processes."""

    slices_per_shard: Count = 16  # every array is cut here: one file, one writer
    batch_size: Annotated[Count, Mark.HARMLESS] = 16  # slices per forward pass and process
    # i/n: only this part of the slices, for one job of an array
    part: Annotated[str, Mark.HARMLESS] = ""
    # look for damage, and make again what is damaged
    verify: Annotated[bool, Mark.HARMLESS] = False
    # that read at once, per process of the launch
    verify_processes: Annotated[Count, Mark.HARMLESS] = 4


@dataclass(frozen=True)
class Saliency:
    """CDM saliency by condition flip: |prediction(object) - prediction(no object)|."""

    timesteps: tuple[int, ...] = (250, 350)
    num_noise_samples: Count = 2  # per timestep
    smooth_pixels: NonNegative = 1.0


@dataclass(frozen=True)
class CgDiff:
    """CG-Diff: what a guided walk to "no object" and back changes (Wolleb et al., MICCAI 2022).

    A baseline of CDM-WSSS (Hu et al., MICCAI 2023). What is published where: docs/method.md.
    """

    enabled: bool = True  # false leaves the method out
    inversion: bool = True  # encode by DDIM, as Wolleb et al.; false: noise, as the CDM-WSSS code
    # chosen by slice labels of validation patients (docs/log.md); published: docs/method.md
    timestep: int = 250
    steps: int = 20  # of DDIM, each way, evenly spaced; the published codes take every timestep
    scale: NonNegative = 100.0  # of the classifier's gradient; Wolleb et al.
    label_scale: NonNegative = 2.0  # of classifier-free guidance by "no object"; 1: the label alone
    smooth_pixels: NonNegative = 1.0


@dataclass(frozen=True)
class CgCdm:
    """CG-CDM: the denoised slice's derivative by its label (Hu et al., "CDM-WSSS")."""

    enabled: bool = True  # false leaves the method out
    # chosen by slice labels of validation patients (docs/log.md); published: docs/method.md
    timestep: int = 250
    steps: int = 10  # adjacent DDIM steps
    scale: NonNegative = 0.1  # of the classifier's gradient. 0: their CDM, without a classifier
    tau: FractionBelowOne = 0.0  # fraction of f(object) in the second label. 0: "no object" itself
    smooth_pixels: NonNegative = 1.0


@dataclass(frozen=True)
class Segment:
    """The segmentation of scans: score maps, thresholds and masks."""

    batch_size: Annotated[Count, Mark.HARMLESS] = 16  # slices per forward pass and process
    # that a decoder embeds at a time, of one slice or several
    tile_pixels: Annotated[Count, Mark.HARMLESS] = 16_384
    # slices that the classifiers, on average, put below are emptied; 0: off
    gate_probability: FractionBelowOne = 0.5
    # headline rule: fraction of negative validation pixels above the threshold
    negative_fraction: ProperFraction = 0.01
    min_component_ml: NonNegative = 0.0  # smaller components are removed, for every method alike
    # whose masks new scans and multi-object label maps get; auto: the one whose areas tell the
    # validation slices apart better (weak validation)
    mask_method: Literal["auto", "cldf", "cldf_plus"] = "auto"
    # only these are scored and evaluated, of those that the run has; empty: all
    methods: tuple[str, ...] = ()
