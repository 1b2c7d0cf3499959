"""The pipeline, in order. Imports no torch; a stage's module has `execute(config, run)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cldf_dist.methods import METHODS

if TYPE_CHECKING:
    from types import ModuleType

    from cldf_dist.config import Config
    from cldf_dist.runs.run import Run


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline: its place, and the settings that its outputs depend on."""

    name: str
    does: str
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()  # its own settings; those of the stages it needs count too
    distributed: bool = True  # False: the main process works, the others wait
    fit_section: str = ""  # whose `fit` a bare fit.* on the command line means

    @property
    def module(self) -> ModuleType:
        """The module of the stage, imported on first use."""
        return import_module(f"cldf_dist.stages.{self.name.replace('-', '_')}")

    @property
    def execute(self) -> Callable[[Config, Run], dict[str, Any]]:
        """The function that runs the stage and returns its summary."""
        function: Callable[[Config, Run], dict[str, Any]] = self.module.execute
        return function

    @property
    def all_sections(self) -> tuple[str, ...]:
        """Every setting that this stage's outputs depend on."""
        found = [*self.sections]
        for name in self.needs:
            found += stage_named(name).all_sections
        return tuple(dict.fromkeys(found))


STAGES = (
    Stage(
        "prepare",
        "turn scans into normalised slices in shards, split by patient",
        sections=("data",),
        distributed=False,
    ),
    Stage(
        "train-diffusion",
        "train the class-conditional diffusion model (CDM)",
        needs=("prepare",),
        sections=("diffusion", "seed", "mixed_precision"),
        fit_section="diffusion.fit",
    ),
    Stage(
        "tune-label-embedding",
        "tune the CDM's label embedding, so that the model uses its label",
        needs=("train-diffusion",),
        sections=("label_tuning",),
        fit_section="label_tuning.fit",
    ),
    Stage(
        "train-classifier",
        "train the external classifier of noised slices, for gradient maps",
        needs=("prepare",),
        # it is trained on the CDM's noise, so the noise schedule is its setting too
        sections=(
            "classifier", "seed", "mixed_precision",
            "diffusion.num_timesteps", "diffusion.schedule",
        ),
        fit_section="classifier.fit",
    ),
    Stage(
        "train-cam",
        "train the classifier of clean slices, for class activation maps",
        needs=("prepare",),
        sections=("cam", "seed", "mixed_precision"),
        fit_section="cam.fit",
    ),
    Stage(
        "train-patch-classifier",
        "train the patch classifier (limited receptive field), for the seeds of cldf_plus",
        needs=("prepare",),
        sections=("patch_classifier", "seed", "mixed_precision"),
        fit_section="patch_classifier.fit",
    ),
    Stage(
        "cache",
        "store diffusion features, maps and seeds of the training slices",
        needs=("tune-label-embedding", "train-classifier", "train-cam", "train-patch-classifier"),
        sections=("cache", "features", "gradient_map", "seeds", "plus.patch_tap"),
    ),
    Stage(
        "train-decoder",
        "train the pixel decoder by the contrastive loss on seed pixels",
        needs=("cache",),
        sections=("decoder", "plus", "evaluate.upper_bound", "evaluate.controls"),
        fit_section="decoder.fit",
    ),
    Stage(
        "segment",
        "write score maps and masks of the test patients, or of new scans (input=, output=)",
        needs=("train-decoder",),
        sections=("segment", *(method.section for method in METHODS if method.section)),
    ),
    Stage(
        "evaluate",
        "compute Dice, IoU, HD95 per patient, intervals, paired tests",
        needs=("segment",),
        sections=("evaluate",),
        distributed=False,
    ),
    Stage(
        "report",
        "write one self-contained HTML page with table, curves and pictures",
        needs=("evaluate",),
        sections=("report",),
        distributed=False,
    ),
)  # fmt: skip


def stage_named(name: str) -> Stage:
    """The stage of that name; ValueError lists the known ones."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    known = ", ".join(stage.name for stage in STAGES)
    raise ValueError(f"unknown stage {name!r}; stages, in order: {known}; or run, for all of them")


def part_folder(stage: Stage, config: Config) -> str:
    """The folder of a stage, or of the part of it that `cache.part` asks for, below the run's."""
    part = config.cache.part if stage.name == "cache" else ""
    return f"{stage.name}/parts/{part.replace('/', '-of-')}" if part else stage.name
