"""The methods of the table, one record each, in the order of the table.

A new baseline is one record here and one function of the same name in `inference/score_maps.py`.
Settings, stages, table, report, pictures and studies read this list. Imports no torch: the settings
are checked against it.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

CLDF, CLDF_PLUS = "cldf", "cldf_plus"
RAW_PATCHES, PATCH_FEATURES = "raw_patches", "patch_features"
SUPERVISED, SUPERVISED_PLUS = "supervised_decoder", "supervised_plus"
ORACLE_INTENSITY = "oracle_intensity"


class Role(StrEnum):
    """The group of methods whose numbers may be compared."""

    BASELINE = "baseline"
    OURS = "ours"
    CONTROL = "control"  # ours without the diffusion model
    UPPER_BOUND = "upper_bound"  # trained on the true masks of the training slices
    ORACLE = "oracle"  # chosen with the true masks of the test patients


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str  # in files and tables
    title: str  # in pictures and the report
    role: Role = Role.BASELINE
    has_decoder: bool = False  # scored by a pixel decoder of its own, which `train-decoder` trains
    section: str = ""  # of the settings that its scores alone depend on
    enabled: str = ""  # the setting that leaves it out where it is false
    is_bounded: bool = True  # scores lie in [0, 1]; others are scaled within the patient to be seen
    in_variants: bool = False  # scored in every variant of a study, without being requested
    # whether the table of variants shows it; "requested": where a variant's `segment.methods` names
    # it
    in_ablations: Literal["always", "requested", "never"] = "requested"

    @property
    def saw_masks(self) -> bool:
        """True for a reference, which is no competitor."""
        return self.role in (Role.UPPER_BOUND, Role.ORACLE)


METHODS = (
    Method("gradcam", "GradCAM"),
    Method("gradcam_pp", "GradCAM++"),
    Method("layercam", "LayerCAM"),
    Method("gradient_map", "gradient map"),
    Method("cdm", "CDM saliency", section="saliency", is_bounded=False),
    Method(
        "cg_diff", "CG-Diff", section="cg_diff", enabled="cg_diff.enabled", is_bounded=False
    ),
    Method("cg_cdm", "CG-CDM", section="cg_cdm", enabled="cg_cdm.enabled", is_bounded=False),
    Method(
        "patch_classifier", "patch classifier", enabled="patch_classifier.enabled",
        in_variants=True, in_ablations="never",
    ),
    Method(CLDF, "CLDF", Role.OURS, has_decoder=True, in_variants=True, in_ablations="always"),
    Method(
        CLDF_PLUS, "CLDF+", Role.OURS, has_decoder=True, in_variants=True, in_ablations="always"
    ),
    # cldf's recipe on the slice itself, and that of cldf_plus on the patch classifier's activations
    Method(
        RAW_PATCHES, "raw patches", Role.CONTROL, has_decoder=True,
        in_variants=True, in_ablations="never",
    ),
    Method(
        PATCH_FEATURES, "patch features", Role.CONTROL, has_decoder=True,
        in_variants=True, in_ablations="never",
    ),
    # cldf and cldf_plus with the true masks of the training slices for seeds
    Method(
        SUPERVISED, "supervised decoder", Role.UPPER_BOUND, has_decoder=True,
        in_variants=True, in_ablations="always",
    ),
    Method(
        SUPERVISED_PLUS, "supervised CLDF+", Role.UPPER_BOUND, has_decoder=True,
        in_variants=True, in_ablations="always",
    ),
    # `evaluate` computes it from the images: no net, no score map
    Method(ORACLE_INTENSITY, "best threshold on one channel", Role.ORACLE, in_ablations="never"),
)  # fmt: skip


def method_named(name: str) -> Method:
    """The record of a method; a name of another version is a baseline, and its own title."""
    return _BY_NAME.get(name) or Method(name, name)


def names_of(*roles: Role) -> tuple[str, ...]:
    """The names of the methods of these roles, in the order of the table."""
    return tuple(method.name for method in METHODS if method.role in roles)


def scored_names() -> tuple[str, ...]:
    """The names of the methods that `segment` makes score maps of, in the order of the table."""
    return tuple(method.name for method in METHODS if method.role is not Role.ORACLE)


def mark(name: str) -> str:
    """The mark behind the name in tables: * saw training masks, † was chosen with test masks."""
    return {Role.UPPER_BOUND: " *", Role.ORACLE: " †"}.get(method_named(name).role, "")


def marked(name: str) -> str:
    """The name with its mark."""
    return name + mark(name)


_BY_NAME = {method.name: method for method in METHODS}
