"""The model card of a trained net, in Hugging Face's form: README.md.

It states facts of the settings and the run folder alone: no claim, and no path, host or patient
name, so that it can be published with the weights. The same run gives the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cldf_dist.config import Config, Data, flatten
from cldf_dist.data.readers.objects import object_title
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.labels import SliceLabel
from cldf_dist.runs.run import Run, read_json, write_atomically

CARD = "README.md"
LOAD_WITH_MONAI = """\
import json
from monai.networks.nets import DiffusionModelUNet
from safetensors.torch import load_file

about = json.load(open("net.json"))
net = DiffusionModelUNet(**about["monai"])
net.load_state_dict(load_file("net.safetensors"))
"""
SHOWN = (  # of the settings in `<section>.fit`
    "steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps",
    "weight_decay", "ema_decay",
)  # fmt: skip
LICENSE = """\
The software that trained these weights is under Apache-2.0. That does not settle the license of the
weights: {terms}\
"""
LIMITS = """\
* For research only. This is not a medical device, and nothing for diagnosis or treatment.
* This card claims no accuracy. Validation numbers are those of the training's own objective; masks
  are scored later, by the run's `evaluate` stage, on test patients.
* Nothing here shows how the net behaves on other scanners, protocols, patients or objects.
* {caution}\
"""
SYNTHETIC = {  # what is said of weights that were trained on the phantom
    "license": "license: apache-2.0",
    "terms": "the training data are synthetic, made by that software, and add no terms.",
    "caution": "The training data are synthetic: what was learnt from them is not meant for scans.",
}
OF_PATIENTS = {
    "license": "license: other\nlicense_name: terms-of-the-training-data",
    "terms": "those trained on a data set carry its terms of use, which may forbid to share or\n"
    "sell them. Read the terms of the data before you pass these weights on.",
    "caution": "Weights can give away images that they were trained on: treat them as you treat "
    "the scans.",
}


@dataclass(frozen=True)
class NetCard:
    """The facts about a net that neither settings nor run folder hold."""

    title: str
    does: str  # input, output and use, in a sentence or two
    learnt_from: str  # which labels
    loading: str  # Python, run in the folder of the weights
    section: str  # of the settings, with a `fit`
    tags: tuple[str, ...] = ()
    library: str = "cldf-dist"
    is_trained: bool = True  # False: the training's own weights were not kept


def load_with_package(function: str, result: str = "net") -> str:
    """Python code that loads a net by a function of `inference.loading` from the working folder."""
    return (
        "from pathlib import Path\n\n"
        f"from cldf_dist.inference.loading import {function}\n\n"
        f'{result} = {function}(Path("."))\n'
    )


def write_card(run: Run, shards: ShardSet, net: NetCard) -> None:
    """Write README.md into the run's folder, which holds provenance and metrics already."""
    data = run.config.data
    said = SYNTHETIC if data.dataset == "phantom" else OF_PATIENTS
    tags = "\n".join(f"- {tag}" for tag in ("medical", "weakly-supervised", *net.tags))
    parts = [
        f"---\n{said['license']}\nlibrary_name: {net.library}\ntags:\n{tags}\n---",
        f"# {net.title}\n\n{net.does}",
        "## Training data\n\n" + _table(_training_data(data, shards, net)),
        "## Settings\n\n" + _table(_settings(run.config, net)),
        _which_weights(run.config, net),
        _last_validation(run),
        "## Provenance\n\n" + _table(_provenance(run)),
        f"## Loading\n\nIn the folder of these files:\n\n```python\n{net.loading}```",
        "## License\n\n" + LICENSE.format(**said),
        "## Limits\n\n" + LIMITS.format(**said),
    ]
    write_atomically(run.folder / CARD, "\n\n".join(parts) + "\n")


def _training_data(data: Data, shards: ShardSet, net: NetCard) -> dict[str, str]:
    slices = shards.split("train")
    with_object, without = (
        (slices.labels == label).sum() for label in (SliceLabel.POSITIVE, SliceLabel.NEGATIVE)
    )
    counts = f"{with_object} with the object, {without} without"
    undecided = len(slices) - with_object - without
    facts = {"data (`data.dataset`)": data.dataset, "object": object_title(data)}
    if data.dataset == "chaos":
        facts["modality"] = data.modality
    return facts | {
        "channels": ", ".join(shards.manifest["channels"]),
        "image size": f"{data.image_size} × {data.image_size} pixels, values in [-1, 1]",
        "training patients": str(len(set(slices.patients))),
        "training slices": f"{len(slices)}: {counts}, {undecided} undecided",
        "learnt from": net.learnt_from,
    }


def _settings(config: Config, net: NetCard) -> dict[str, str]:
    known = flatten(config)
    paths = [*(f"{net.section}.fit.{name}" for name in SHOWN), "seed", "mixed_precision"]
    return {f"`{path}`": str(known[path]) for path in paths}


def _which_weights(config: Config, net: NetCard) -> str:
    if not net.is_trained:
        return "The file does not hold what this training made."
    decay = flatten(config)[f"{net.section}.fit.ema_decay"]
    weights = "the moving average of the weights" if decay else "the weights after the last step"
    return f"The file holds {weights}. `batch_size` counts over all processes."


def _last_validation(run: Run) -> str:
    """The section of the newest validation numbers in metrics.jsonl."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    for entry in map(json.loads, reversed(lines)):
        numbers = {name: value for name, value in entry.items() if name.startswith("validation/")}
        if numbers:
            shown = {name.removeprefix("validation/"): f"{v:.4g}" for name, v in numbers.items()}
            return f"## Validation at step {entry['step']}\n\n{_table(shown)}"
    return "## Validation\n\nNone: this training is not validated."


def _provenance(run: Run) -> dict[str, str]:
    starts = read_json(run.folder / "provenance.json")["starts"]
    last = starts[-1]
    return {
        "started": starts[0]["time"] + (f", last resumed {last['time']}" if starts[1:] else ""),
        "commit": _in_order(_commit(start["git"]) for start in starts),
        "processes": _in_order(str(start["processes"]) for start in starts),
        "devices": _in_order(device for start in starts for device in start["devices"]),
        "versions": ", ".join(f"{name} {version}" for name, version in last["versions"].items()),
    }


def _commit(git: Mapping[str, Any]) -> str:
    if not git["commit"]:
        return "not known"
    return f"{git['commit']}{', with uncommitted changes' if git['dirty'] else ''}"


def _in_order(values: Iterable[str]) -> str:
    """Each value once, in the order of the starts of the training."""
    return "; ".join(dict.fromkeys(values))


def _table(rows: Mapping[str, str]) -> str:
    escaped = {name: value.replace("|", "\\|") for name, value in rows.items()}
    lines = [f"| {name} | {value} |" for name, value in escaped.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
