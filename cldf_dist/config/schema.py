"""Every setting of the pipeline, with its one default, its bounds, its unit and its provenance.

Provenance of the constants: only the abstract of the CLDF paper (arXiv 2506.23460) is public, so
each number below is our choice; where one rests on a measurement, `docs/log.md` holds it.
The sections of the data, the nets and the method lie beside this file. None imports torch, so that
`cldf --help` answers at once.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from cldf_dist.config.data import Data
from cldf_dist.config.fields import CheckedWhere, Count, Mark, ProperFraction
from cldf_dist.config.method import (
    Cache,
    CgCdm,
    CgDiff,
    Features,
    GradientMap,
    Plus,
    Saliency,
    Seeds,
    Segment,
)
from cldf_dist.config.nets import (
    Cam,
    Classifier,
    Decoder,
    Diffusion,
    LabelTuning,
    PatchClassifier,
)


@dataclass(frozen=True)
class Evaluate:
    """The evaluation: its intervals, and the upper bound and controls that it trains."""

    confidence: ProperFraction = 0.95
    resamples: Count = 10_000
    upper_bound: bool = True  # train and report `supervised_decoder` where training masks exist
    # train and report `raw_patches`, the same decoder on the slice itself, where features.taps has
    # an image tap beside those of the CDM
    controls: bool = True


@dataclass(frozen=True)
class Report:
    """The figures of the report."""

    slices_per_patient: Count = 3


@dataclass(frozen=True)
class Tracking:
    """The tracking of a run in MLflow."""

    enabled: bool = True
    uri: str = ""  # empty: sqlite in the folder of runs
    experiment: str = "cldf"


@dataclass(frozen=True)
class RunSettings:
    """The supervision of a run's processes."""

    heartbeat_seconds: float = 300.0  # silence of the main process that counts as its death


@dataclass(frozen=True)
class Config:
    """All settings of a run, by section."""

    name: str = ""  # of the run; default: the config files' stems joined by "-"
    runs: Annotated[str, Mark.HOME_ALLOWED] = "runs"  # folder of all runs
    seed: int = 0
    # auto: bf16 on a GPU; fp16 for GPUs older than sm_80
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    input: Annotated[str, Mark.HOME_ALLOWED] = ""  # segment only: a new scan or a folder of scans
    output: Annotated[str, Mark.HOME_ALLOWED] = ""  # segment only: where its masks go
    data: Data = Data()
    diffusion: Diffusion = Diffusion()
    label_tuning: LabelTuning = LabelTuning()
    classifier: Classifier = Classifier()
    cam: Cam = Cam()
    patch_classifier: PatchClassifier = PatchClassifier()
    gradient_map: Annotated[GradientMap, Mark.DECIDES_CACHE] = GradientMap()
    features: Annotated[Features, Mark.DECIDES_CACHE] = Features()
    seeds: Annotated[Seeds, Mark.DECIDES_CACHE] = Seeds()
    plus: Plus = Plus()
    cache: Cache = Cache()
    decoder: Decoder = Decoder()
    saliency: Saliency = Saliency()
    cg_diff: Annotated[CgDiff, CheckedWhere("cg_diff.enabled", True)] = CgDiff()
    cg_cdm: Annotated[CgCdm, CheckedWhere("cg_cdm.enabled", True)] = CgCdm()
    segment: Segment = Segment()
    evaluate: Evaluate = Evaluate()
    report: Report = Report()
    tracking: Tracking = Tracking()
    run: RunSettings = RunSettings()

    @property
    def run_folder(self) -> Path:
        """The folder of this run."""
        return Path(self.runs) / self.name


FITTED = tuple(field.name for field in fields(Config) if hasattr(field.default, "fit"))
