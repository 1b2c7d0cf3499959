"""Settings of the data, and of the random changes of training slices."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from cldf_dist.config.fields import CheckedWhere, Count, Mark, Positive

EACH = "each"  # of the data set's objects
LARGEST_IMAGE = 4096  # pixels: what is larger is a slip of the keyboard
OBJECTS = {  # by data set, where they are known without a look at the data
    "brats": ("whole_tumour", "tumour_core", "enhancing_tumour"),
    "phantom": ("lesion",),
}
CHAOS_OBJECTS = {  # by modality
    "ct": ("liver",),
    "mr_t1": ("liver", "right_kidney", "left_kidney", "spleen"),
    "mr_t2": ("liver", "right_kidney", "left_kidney", "spleen"),
}

Dataset = Literal["brats", "chaos", "dicom", "nnunet", "phantom"]
Modality = Literal["ct", "mr_t1", "mr_t2"]  # mr_t1: in and out of phase


@dataclass(frozen=True)
class Phantom:
    """The synthetic data set: what `data.dataset=phantom` generates."""

    num_patients: Annotated[int, Ge(3)] = 44
    num_slices: Annotated[int, Ge(4)] = 24
    grid_size: Annotated[int, Ge(16)] = 64  # pixels, in-plane
    seed: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class Data:
    """The data set, what is segmented in it, and how its scans become prepared slices."""

    dataset: Annotated[Dataset, Mark.SELECTS_SOURCE] = "brats"
    # folder of the native data set; unused by the phantom
    root: Annotated[str, Mark.HOME_ALLOWED, Mark.NOT_IN_SHARDS] = ""
    # what is segmented: a name that the data set knows, or several joined by "+" into one object
    # (right_kidney+left_kidney); empty: the data set's usual or only one. Names with commas
    # between them (liver,spleen), or "each": one run per object, see cli/multi_object.py
    object: Annotated[str, Mark.SELECTS_SOURCE] = ""
    modality: Annotated[Modality, Mark.SELECTS_SOURCE, CheckedWhere("data.dataset", "chaos")] = (
        "mr_t1"  # chaos only
    )
    # CSV file of slice or volume labels, for nnunet and dicom. Its path is harmless, as that of
    # splits: their contents count, and `prepare` compares those
    labels: Annotated[str, Mark.FROM_CONFIG_FILE, Mark.NOT_IN_SHARDS, Mark.HARMLESS] = ""
    # JSON file {"train": [patient, ...], "validation": ..., "test": ...}
    splits: Annotated[str, Mark.FROM_CONFIG_FILE, Mark.NOT_IN_SHARDS, Mark.HARMLESS] = ""
    validation_fraction: Annotated[Positive, Mark.DRAWS_SPLIT] = 0.15  # of the patients
    test_fraction: Annotated[Positive, Mark.DRAWS_SPLIT] = 0.25  # of the patients
    split_seed: Annotated[int, Mark.DRAWS_SPLIT] = 0
    # pixels; slices are cropped to the body and resampled to a square
    image_size: Annotated[int, Interval(ge=16, le=LARGEST_IMAGE)] = 128
    min_object_pixels: Count = 50  # in-plane pixels of the original scan that make a slice positive
    min_body_fraction: float = 0.05  # of the square; emptier slices are not used
    # how the body is separated from the air
    subject: Annotated[Literal["auto", "nonzero", "tissue"], Mark.SELECTS_SOURCE] = "auto"
    # (low, high) of the stored values, mapped to [-1, 1] in place of the robust standardisation;
    # empty: the abdominal window for CT, the robust standardisation for everything else
    window: tuple[float, ...] = ()
    clip_low: float = -3.5  # robust standard deviations from the median that map to -1
    clip_high: float = 5.5  # robust standard deviations from the median that map to +1
    slices_per_shard: Count = 256
    # what to do with a slice whose checksum is wrong
    on_damaged: Annotated[Literal["error", "skip"], Mark.NOT_IN_SHARDS] = "error"
    # URL (s3://, gs://, https://, file:// ...) of a remote `prepare` folder, to be used as
    # it is; then data.root is not needed
    shards: Annotated[str, Mark.NOT_IN_SHARDS] = ""
    # where the shards of that URL are staged, one folder per node, best a disk of its own; empty:
    # cldf-shards-<user number> in $TMPDIR or /tmp
    shard_cache: Annotated[str, Mark.NOT_IN_SHARDS, Mark.HARMLESS] = ""
    # 1e9 bytes; it holds no more, the least recently used go first
    shard_cache_gb: Annotated[Positive, Mark.NOT_IN_SHARDS, Mark.HARMLESS] = 50.0
    phantom: Annotated[Phantom, CheckedWhere("data.dataset", "phantom")] = Phantom()


@dataclass(frozen=True)
class Augment:
    """Random changes of a training slice; a function of (seed, sample number) alone."""

    flip: bool = True  # left-right; switch off where sides differ (abdomen)
    rotate_degrees: float = 10.0  # uniform in +- this
    scale: float = 0.08  # uniform relative change of size in +- this
    shift: float = 0.03  # uniform shift in +- this, as a fraction of the image size
    intensity: float = 0.05  # standard deviation of the channel-wise gain
    probability: float = 0.8  # of the affine and intensity part
