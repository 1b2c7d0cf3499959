"""The configuration: its sections, `load` and `check`, and the settings that carry a mark."""

from cldf_dist.config.data import CHAOS_OBJECTS, EACH, Augment, Data, Phantom
from cldf_dist.config.fields import Mark, marked
from cldf_dist.config.loading import (
    build,
    build_section,
    flatten,
    from_plain,
    load,
    to_plain,
    to_yaml,
)  # fmt: skip
from cldf_dist.config.method import (
    Cache,
    CamMethod,
    CgCdm,
    CgDiff,
    Features,
    GradientMap,
    Plus,
    Saliency,
    SeedRule,
    Seeds,
    Segment,
)  # fmt: skip
from cldf_dist.config.nets import (
    CAM_MIN_CHANNELS,
    CAM_NORM_GROUPS,
    Cam,
    Classifier,
    Contrast,
    Decoder,
    Diffusion,
    Fit,
    LabelTuning,
    Layout,
    PatchClassifier,
    Prediction,
    UNet,
)  # fmt: skip
from cldf_dist.config.rules import check
from cldf_dist.config.schema import (
    FITTED,
    Config,
    Evaluate,
    Report,
    RunSettings,
    Tracking,
)  # fmt: skip

__all__ = [
    "CAM_MIN_CHANNELS", "CAM_NORM_GROUPS", "CHAOS_OBJECTS", "EACH", "FITTED",
    "Augment", "Cache", "Cam", "CamMethod", "CgCdm", "CgDiff", "Classifier",
    "Config", "Contrast", "Data", "Decoder", "Diffusion", "Evaluate", "Features", "Fit",
    "GradientMap", "LabelTuning", "Layout", "Mark", "PatchClassifier", "Phantom", "Plus",
    "Prediction", "Report", "RunSettings", "Saliency", "SeedRule", "Seeds", "Segment", "Tracking",
    "UNet", "build", "build_section", "check", "flatten", "from_plain", "load", "marked",
    "to_plain", "to_yaml",
]  # fmt: skip
