"""Settings of the nets, each with its training."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Len, MultipleOf

from cldf_dist.config.data import Augment
from cldf_dist.config.fields import (
    Count,
    Fraction,
    FractionBelowOne,
    Mark,
    NaturalNumber,
    NonNegative,
    Positive,
    PositiveFraction,
)

Layout = Literal["auto", "always", "never"]
Attention = Literal["sdpa", "xformers", "auto"]
NoiseSchedule = Literal["cosine", "linear"]
Prediction = Literal["v_prediction", "epsilon"]
CamLayer = Literal["layer1", "layer2", "layer3", "layer4"]

# oneDNN's weight gradient of a strided 1x1 convolution, which MONAI's shortcuts are, writes out of
# bounds in channels_last for fewer input channels than this (github.com/uxlfoundation/oneDNN,
# issue 6035; open, torch 2.13 crashes)
CAM_MIN_CHANNELS = 16
CAM_NORM_GROUPS = 8  # of the ResNet
CamChannels = Annotated[int, Ge(CAM_MIN_CHANNELS), MultipleOf(CAM_NORM_GROUPS)]


@dataclass(frozen=True)
class Fit:
    """One training. Steps are optimizer steps; `batch_size` is global, over all processes."""

    steps: Count = 10_000
    batch_size: Count = 32
    gradient_accumulation_steps: Count = 1  # micro-batches per optimizer step and process
    learning_rate: Positive = 2e-4
    warmup_steps: NaturalNumber = 200
    final_learning_rate_fraction: float = 0.05  # of `learning_rate`, at the end of the cosine
    weight_decay: NonNegative = 1e-4
    clip_norm: NonNegative = 1.0  # gradient norm; 0 switches clipping off
    ema_decay: FractionBelowOne = 0.999  # of the moving average of the weights; 0: none
    checkpoint_every: Annotated[Count, Mark.HARMLESS] = 1000  # steps
    keep_checkpoints: Annotated[Count, Mark.HARMLESS] = 2  # checkpoints
    validate_every: NaturalNumber = 500  # steps; 0 switches validation off
    validation_samples: int = 128
    preview_every: Annotated[int, Mark.HARMLESS] = 0  # steps; 0 only at the end
    log_every: Annotated[Count, Mark.HARMLESS] = 10  # steps
    num_workers: Annotated[NaturalNumber, Mark.HARMLESS] = 0  # loader processes per rank
    compile: Annotated[bool, Mark.HARMLESS] = False  # torch.compile of the net
    # the memory layout; auto: on CPUs, without ZeRO
    channels_last: Annotated[Layout, Mark.HARMLESS] = "auto"
    # weights to begin with: a .safetensors file, the folder of a finished training, or one of its
    # checkpoints; a relative path is meant from the working folder. Empty: random weights
    start_from: str = ""
    # non-finite steps in a row before the training stops
    max_skipped_steps: Annotated[int, Mark.HARMLESS] = 20


@dataclass(frozen=True)
class UNet:
    """The network of the diffusion model."""

    channels: tuple[int, ...] = (64, 128, 256, 256)  # per level, finest first
    num_res_blocks: Count = 2  # per level
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    num_head_channels: Count = 32
    norm_num_groups: Count = 16
    # auto: xformers where it runs. Of the training; later stages take sdpa
    attention: Annotated[Attention, Mark.HARMLESS] = "sdpa"
    # less memory in training, for one more forward pass
    gradient_checkpointing: Annotated[bool, Mark.HARMLESS] = False


@dataclass(frozen=True)
class Diffusion:
    """The class-conditional diffusion model (CDM)."""

    net: UNet = UNet()
    num_timesteps: Count = 1000
    schedule: NoiseSchedule = "cosine"
    prediction: Prediction = "v_prediction"
    min_snr_gamma: float = 5.0  # loss weight min(SNR, gamma); Hang et al. 2023; 0 switches it off
    label_dropout: Fraction = 0.1  # fraction of samples trained without a label
    augment: Augment = Augment()
    fit: Fit = Fit()


@dataclass(frozen=True)
class LabelTuning:
    """The CDM's label embedding alone, trained on until a wrong label predicts the noise worse."""

    enabled: bool = True  # false leaves the embedding as `train-diffusion` made it
    timestep_range: tuple[int, int] = (
        200,
        450,
    )  # timesteps: lowest, and the first that is too high
    # validation slices by whose labels the better of the two embeddings is kept
    compared_slices: Count = 128
    augment: Augment = Augment()
    fit: Fit = Fit(
        steps=200,
        batch_size=16,
        learning_rate=6e-2,
        warmup_steps=10,
        weight_decay=0.0,
        ema_decay=0.95,
        checkpoint_every=100,
        validate_every=100,
    )


@dataclass(frozen=True)
class Classifier:
    """The external classifier: it sees noised slices, its gradient is the gradient map."""

    channels: tuple[int, ...] = (32, 64, 96, 128)
    num_res_blocks: Count = 1
    attention_levels: tuple[bool, ...] = (False, False, False, False)  # it blurs the gradient
    num_head_channels: Count = 32
    norm_num_groups: Count = 16
    dropout: float = 0.1  # before the linear layer
    max_timestep: int = 300  # timestep; training noise is drawn below it
    clean_fraction: FractionBelowOne = 0.3  # of the training samples get no noise
    label_smoothing: float = 0.02
    augment: Augment = Augment()
    fit: Fit = Fit(steps=3000, learning_rate=5e-4, weight_decay=0.05, ema_decay=0.99)


@dataclass(frozen=True)
class Cam:
    """The clean classifier behind the class activation maps."""

    channels: Annotated[tuple[CamChannels, ...], Len(4, 4)] = (32, 64, 128, 256)  # ResNet stages
    blocks: Annotated[tuple[Count, ...], Len(4, 4)] = (1, 1, 1, 1)
    # whose activations make the maps; finer layers localise better
    layer: Annotated[CamLayer, Mark.DECIDES_CACHE] = "layer2"
    dropout: float = 0.1
    label_smoothing: float = 0.02
    augment: Augment = Augment()
    fit: Fit = Fit(steps=3000, learning_rate=5e-4, weight_decay=0.05, ema_decay=0.99)


@dataclass(frozen=True)
class PatchClassifier:
    """The classifier of small windows, whose patch logits make the seeds of `cldf_plus`."""

    # false leaves out the methods patch_classifier and cldf_plus
    enabled: Annotated[bool, Mark.DECIDES_CACHE] = True
    channels: Count = 32
    layers: Count = 4  # 3x3 convolutions: a pixel's logit depends on 2 layers + 1 pixels
    downsample: Count = 1  # pixels of the slice per pixel of the net, in each direction
    # of the body's pixels, the highest, make the slice's logit
    pooled_fraction: PositiveFraction = 0.02
    dropout: FractionBelowOne = 0.2  # of whole channels, before the linear layer
    label_smoothing: FractionBelowOne = 0.0
    augment: Augment = Augment()
    fit: Fit = Fit(steps=3000, learning_rate=2e-3, weight_decay=0.05, ema_decay=0.99)


@dataclass(frozen=True)
class Contrast:
    """The supervised contrastive loss of the pixel decoder, and the pixels it samples."""

    temperature: Positive = 0.1
    object_pixels: int = 256  # per step, over all processes
    background_pixels: int = 384  # per step, over all processes; half from negative slices
    # fraction of a slice's background pixels that are drawn from its hardest: where the activation
    # or the gradient map, scaled within the slice, speaks most for the object; 0: drawn at random
    hard_negatives: Fraction = 0.0
    hard_pool: PositiveFraction = 0.1  # fraction of a slice's background that counts as its hardest
    # what computes the loss; auto: triton on a GPU
    backend: Literal["auto", "triton", "torch"] = "auto"
    # of the scores in Triton's kernels
    precision: Literal["auto", "fp16", "bf16", "tf32", "fp32"] = "auto"
    deterministic: bool = False  # bit-identical from run to run on a GPU too; costs some speed


@dataclass(frozen=True)
class Decoder:
    """The pixel decoder: a pointwise network from features to a unit-length embedding."""

    hidden: Count = 64
    embedding: Count = 16
    dropout: FractionBelowOne = 0.5  # of the standardised features
    noise: float = 0.5  # standard deviation added to the standardised features
    prototype_pixels: Count = 20_000  # training seeds per class behind its prototypes
    prototypes_per_class: Count = 1  # 1: the mean direction; more: centres of spherical k-means
    # cross_entropy, of a linear classifier, is there to compare
    loss: Literal["contrastive", "cross_entropy"] = "contrastive"
    contrast: Contrast = Contrast()
    fit: Fit = Fit(
        steps=300,
        learning_rate=2e-3,
        warmup_steps=20,
        weight_decay=0.05,
        ema_decay=0.98,
        checkpoint_every=100,
        validate_every=0,
    )
