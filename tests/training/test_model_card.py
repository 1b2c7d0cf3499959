import dataclasses
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cldf_dist.config import Config
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.loading import load_diffusion
from cldf_dist.method.counterfactual import EMBEDDING
from cldf_dist.methods import CLDF_PLUS, PATCH_FEATURES, Role, names_of
from cldf_dist.runs.run import Run, read_config
from cldf_dist.stages import stage_named, train_cam, train_decoder, train_diffusion
from cldf_dist.training.model_card import LOAD_WITH_MONAI, write_card

UPPER_BOUNDS = names_of(Role.UPPER_BOUND)
ROOT = Path(__file__).parents[2]
CARDS = (
    "train-diffusion", "tune-label-embedding", "train-classifier", "train-cam",
    "train-patch-classifier",
    "train-decoder",
    *(f"train-decoder/{row}" for row in (CLDF_PLUS, PATCH_FEATURES, *UPPER_BOUNDS)),
)  # fmt: skip


def card(debug_run: Any, stage: str) -> str:
    return str((debug_run.folder / stage / "README.md").read_text())


def rows(text: str) -> dict[str, str]:
    """First and second column of all tables."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))


def program_of(text: str) -> str:
    """The card's block of Python, which runs in the folder of the weights."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(program)


def copied(debug_run: Any, runs: Path, stage: str) -> Run:
    """The stage in a folder of its own, as the stage itself sees it."""
    debug_run.copy_to(runs, "prepare", stage)
    config = read_config(runs / "debug" / stage / "config.yaml")
    return Run(dataclasses.replace(config, runs=str(runs)), stage, ())


def as_data(run: Run, **changes: str) -> Run:
    """The same run with other words about its data."""
    config: Config = run.config
    data = dataclasses.replace(config.data, **changes)  # type: ignore[arg-type]
    return Run(dataclasses.replace(config, data=data), run.stage, ())


@pytest.mark.parametrize("stage", CARDS)
def test_every_trained_net_has_a_card_that_says_what_the_run_knows(
    debug_run: Any, stage: str
) -> None:
    text = card(debug_run, stage)
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0"  # synthetic data
    assert "medical" in head["tags"]
    assert head["library_name"] == ("monai" if stage == "train-diffusion" else "cldf-dist")
    said = rows(text)
    manifest = json.loads((debug_run.folder / "prepare" / "manifest.json").read_text())
    assert said["training patients"] == str(len(manifest["splits"]["train"]))
    labels = [
        sample["label"]
        for shard in manifest["shards"]
        if shard["split"] == "train"
        for sample in shard["samples"]
    ]
    assert said["training slices"] == (
        f"{len(labels)}: {labels.count(1)} with the object, {labels.count(0)} without, "
        f"{labels.count(-1)} undecided"
    )
    section = stage_named(stage.split("/")[0]).fit_section.removesuffix(".fit")
    assert said[f"`{section}.fit.steps`"] == "6"
    start = json.loads((debug_run.folder / stage / "provenance.json").read_text())["starts"][0]
    assert said["started"] == start["time"]
    assert start["git"]["commit"] in said["commit"]
    assert ("uncommitted" in said["commit"]) == start["git"]["dirty"]
    assert f"torch {start['versions']['torch']}" in said["versions"]


@pytest.mark.parametrize("stage", CARDS)
def test_a_card_names_neither_host_nor_path_nor_patient(debug_run: Any, stage: str) -> None:
    text = card(debug_run, stage)
    manifest = json.loads((debug_run.folder / "prepare" / "manifest.json").read_text())
    patients = [name for names in manifest["splits"].values() for name in names]
    for word in (str(debug_run.runs), str(ROOT), socket.gethostname(), *patients):
        assert word not in text


def test_validation_numbers_are_the_last_of_the_run(debug_run: Any) -> None:
    lines = (debug_run.folder / "train-cam" / "metrics.jsonl").read_text().splitlines()
    last = [entry for entry in map(json.loads, lines) if "validation/loss" in entry][-1]
    text = card(debug_run, "train-cam")
    assert f"## Validation at step {last['step']}\n" in text
    assert rows(text)["loss"] == f"{last['validation/loss']:.4g}"
    assert rows(text)["accuracy"] == f"{last['validation/accuracy']:.4g}"
    assert "this training is not validated" in card(debug_run, "train-decoder")


def test_the_reference_says_that_it_saw_masks(debug_run: Any) -> None:
    saw_masks = {f"train-decoder/{row}" for row in UPPER_BOUNDS}
    assert saw_masks < set(CARDS)
    for stage in CARDS:
        said = rows(card(debug_run, stage))["learnt from"]
        assert ("true masks" in said) == (stage in saw_masks), stage
        assert ("no mask was read" in said) == (stage not in saw_masks), stage


@pytest.mark.parametrize("stage", CARDS[1:])
def test_the_lines_that_load_the_net_load_it(
    debug_run: Any, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.chdir(debug_run.folder / stage)
    found: dict[str, Any] = {}
    exec(program_of(card(debug_run, stage)), found)
    stored = load_file("net.safetensors")
    weights = found["net"].state_dict()
    if stage == "tune-label-embedding":  # loaded into the model that it belongs to
        weights = {"weight": weights[EMBEDDING]}
    assert set(weights) == set(stored)
    assert all(torch.equal(weights[name], value) for name, value in stored.items())


@pytest.mark.slow
def test_plain_monai_loads_the_diffusion_model_and_gives_what_it_gives(
    debug_run: Any, tmp_path: Path
) -> None:
    """By the lines of the card, in a process that does not know this package."""
    folder = debug_run.folder / "train-diffusion"
    inputs = torch.randn(3, 4, 32, 32), torch.tensor([0, 5, 900]), torch.arange(3)
    torch.save(inputs, tmp_path / "inputs.pt")
    program = f"""
import sys, torch

{program_of(card(debug_run, "train-diffusion"))}
x, timesteps, labels = torch.load({str(tmp_path / "inputs.pt")!r})
with torch.no_grad():
    torch.save(net(x, timesteps, class_labels=labels), {str(tmp_path / "output.pt")!r})
assert not any(name.startswith("cldf") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", program], cwd=folder, check=True)
    net, _ = load_diffusion(folder)
    with torch.no_grad():
        expected = net(inputs[0], inputs[1], class_labels=inputs[2])
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected)
    assert expected.abs().max() > 0


def test_the_documentation_loads_the_diffusion_model_in_the_same_lines() -> None:
    assert f"```python\n{LOAD_WITH_MONAI}```" in (ROOT / "docs" / "data.md").read_text()


def test_the_same_run_gives_the_same_card(debug_run: Any, tmp_path: Path) -> None:
    run = copied(debug_run, tmp_path, "train-diffusion")
    write_card(run, ShardSet(tmp_path / "debug" / "prepare"), train_diffusion.NET_CARD)
    assert (run.folder / "README.md").read_text() == card(debug_run, "train-diffusion")


def test_weights_of_patients_carry_the_terms_of_their_data(debug_run: Any, tmp_path: Path) -> None:
    run = as_data(
        copied(debug_run, tmp_path, "train-cam"),
        dataset="chaos",
        modality="mr_t2",
        object="left_kidney",
        root="/data/of/the/clinic",
    )
    write_card(run, ShardSet(tmp_path / "debug" / "prepare"), train_cam.NET_CARD)
    text = (run.folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["license_name"]) == ("other", "terms-of-the-training-data")
    assert rows(text)["modality"] == "mr_t2"
    assert rows(text)["object"] == "left kidney"
    assert "clinic" not in text
    assert "Read the terms of the data" in text
    assert "treat them as you treat the scans" in text


def test_a_resumed_training_names_every_commit(debug_run: Any, tmp_path: Path) -> None:
    run = copied(debug_run, tmp_path, "train-decoder")
    path = run.folder / "provenance.json"
    first = json.loads(path.read_text())["starts"][0]
    later = {**first, "time": "2030-01-02T03:04:05+0000", "git": {"commit": "", "dirty": False}}
    first["git"] = {"commit": "abc", "dirty": True}
    path.write_text(json.dumps({"starts": [first, later]}))
    write_card(run, ShardSet(tmp_path / "debug" / "prepare"), train_decoder.NET_CARD)
    said = rows((run.folder / "README.md").read_text())
    assert said["commit"] == "abc, with uncommitted changes; not known"
    assert said["started"] == f"{first['time']}, last resumed 2030-01-02T03:04:05+0000"
