"""Tune the label embedding of the trained diffusion model, and nothing else of it.

The tuned embedding is kept where CDM saliency then agrees better with the slice labels of the
validation patients, else the one that `train-diffusion` made.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cldf_dist.config import Config
from cldf_dist.data.readers import datasets
from cldf_dist.inference.loading import load_diffusion, noise_schedule, place
from cldf_dist.inference.saliency_agreement import saliency_agreement
from cldf_dist.nets.unet import build_unet
from cldf_dist.runs.run import Run
from cldf_dist.tasks.label_discrimination import LabelDiscrimination
from cldf_dist.training.export import save_net
from cldf_dist.training.fit import fit
from cldf_dist.training.model_card import NetCard, write_card
from cldf_dist.training.on_slices import shard_set, training_stream, validation_stream
from cldf_dist.training.time_estimate import training_time

LOAD_TOGETHER = """\
from pathlib import Path

from cldf_dist.inference.loading import load_diffusion

net, schedule = load_diffusion(Path("../train-diffusion"), Path("."))
"""
NET_CARD = NetCard(
    title="Label embedding of a class-conditional diffusion model",
    does=(
        "Three rows, for no object, object, and no label given (which stays as it was). They take "
        "the place of `class_embedding.weight` in the diffusion model that `train-diffusion` made: "
        "tuned so that the right label predicts a slice's noise better than the wrong one."
    ),
    learnt_from="labels of whole slices: object or not; no mask was read in the training",
    loading=LOAD_TOGETHER,
    section="label_tuning",
    tags=("diffusion",),
)
UNCHANGED_CARD = dataclasses.replace(
    NET_CARD,
    does=(
        "The three rows of `class_embedding.weight` as `train-diffusion` made them: those that "
        "the training below made agree no better with the slice labels of the validation patients "
        "(`net.json` has both numbers), and are not kept."
    ),
    is_trained=False,
)


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Tune the label embedding, if enabled; returns which embedding is kept and why."""
    settings = config.label_tuning
    if not settings.enabled:
        return {"enabled": False}
    shards = shard_set(config, run)
    diffusion, schedule = load_diffusion(run.needs("train-diffusion"))
    stream = training_stream(config, shards, settings.augment)
    task = tell_apart(config, diffusion)
    tuned: Any = fit(task, stream, settings.fit, run, validation_stream(config, shards))
    embeddings = {"trained": diffusion.get_submodule("class_embedding"), "tuned": tuned}
    agreement = {}
    for name, embedding in embeddings.items():
        diffusion.class_embedding = embedding
        table = shards.split("validation")
        agreement[name] = saliency_agreement(config, table, diffusion, schedule)
    kept = kept_embedding(agreement)
    words = ", ".join(f"{name} {_shown(value)}" for name, value in agreement.items())
    if run.is_main:
        print(
            f"tune-label-embedding: agreement with slice labels: {words}; kept: {kept}",
            file=sys.stderr,
        )
        num_labels, num_features = tuned.weight.shape
        about = {
            "kind": "label embedding of the diffusion model",
            "num_labels": num_labels,
            "num_features": num_features,
            "kept": kept,
            "area_auroc": agreement,
        }
        save_net(embeddings[kept], run.folder, about)
        write_card(run, shards, NET_CARD if kept == "tuned" else UNCHANGED_CARD)
    return {"enabled": True, "kept": kept, "area_auroc": agreement}


def estimate(config: Config, folder: Path) -> dict[str, str]:
    """The size of what is trained and the time, as `--dry-run` prints them."""
    settings = config.label_tuning
    if not settings.enabled:
        return {"time": "none: label_tuning.enabled=false"}
    num_channels = len(datasets.channels(config.data))
    diffusion = place(build_unet(config.diffusion.net, num_channels))
    return training_time(
        tell_apart(config, diffusion), settings.fit, num_channels, config.data.image_size
    )


def kept_embedding(agreement: Mapping[str, float | None]) -> str:
    """The name of the embedding that agrees better; "trained" where they are equal or unknown."""
    trained, tuned = (agreement[name] or 0.0 for name in ("trained", "tuned"))
    return "tuned" if tuned > trained else "trained"


def _shown(agreement: float | None) -> str:
    return "unknown" if agreement is None else f"{agreement:.3f}"


def tell_apart(config: Config, diffusion: nn.Module) -> LabelDiscrimination:
    """The task of the stage, on a frozen diffusion model."""
    return LabelDiscrimination(
        diffusion,
        noise_schedule(config),
        timestep_range=config.label_tuning.timestep_range,
        seed=config.seed,
    )
