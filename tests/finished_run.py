"""A small run folder up to `segment`, made with the real writers; what is in it is known by hand.

Scans are 16 x 16 x 6 voxels of 1 x 1 x 2 mm, the subject is 14 x 14 in each slice, the object a box
of 4 x 4 x 2 = 32 voxels in slices 2 and 3. Prepared and native pixels coincide.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cldf_dist.config import Config, Data, Evaluate, Report, Tracking
from cldf_dist.data.formats.nifti import Volume, write_nifti
from cldf_dist.data.shards.write import write_manifest, write_shards
from cldf_dist.data.slices import Slice, prepare_volume
from cldf_dist.methods import SUPERVISED
from cldf_dist.runs.run import Run
from cldf_dist.scoring.masks import PatientScores, native_scores, object_mask

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])
RAS = np.diag([1.0, 1.0, 2.0, 1.0])
FOUND = [f"found_{number}" for number in range(5)]
MISSED, ALARM, CLEAN, UNSCORED = "missed", "alarm", "clean", "unscored"
TEST_PATIENTS = [*FOUND, MISSED, ALARM, CLEAN, UNSCORED]
CUT = 0.5
SEEDS = {"object_precision": 0.875, "object_recall": 0.25, "object_seeds": 1234}


def settings(runs: Path) -> Config:
    return Config(
        name="a&b",
        runs=str(runs),
        data=Data(dataset="phantom", image_size=16, min_object_pixels=4, slices_per_shard=8),
        evaluate=Evaluate(resamples=200),
        report=Report(slices_per_patient=2),
        tracking=Tracking(enabled=False),
    )


def box() -> np.ndarray:
    mask = np.zeros((16, 16, 6), bool)
    mask[4:8, 5:9, 2:4] = True
    return mask


def make_run(config: Config, *, with_truth: bool = True) -> None:
    """All stages that `evaluate` and `report` read."""
    volumes = {name: volume(name) for name in [*TEST_PATIENTS, "validation_0", "train_0"]}
    prepared = {name: prepare_volume(scan, config.data) for name, scan in volumes.items()}
    prepare_stage(config, volumes, prepared, with_truth=with_truth)
    for stage in ("train-diffusion", "train-classifier", "train-decoder"):
        training_stage(config, stage)
    finish(config, "cache", {"seeds": SEEDS, "seed_cam": "gradcam"})
    segment_stage(config, volumes, prepared)


def volume(name: str) -> Volume:
    rng = np.random.default_rng(sum(name.encode()))
    image = rng.integers(100, 900, (4, 16, 16, 6)).astype(np.int16)
    inside = np.zeros((16, 16, 6), bool)
    inside[1:15, 1:15] = True
    mask = np.zeros_like(inside) if name in (ALARM, CLEAN) else box()
    if name == "validation_0":
        mask[9, 9, 4] = True  # too little to call the slice positive
    affine = RAS if name == FOUND[1] else LPS
    return Volume(name, image, inside, None if name == UNSCORED else mask, affine)


def finish(config: Config, stage: str, outputs: dict) -> None:
    run = Run(config, stage, ())
    run.open()
    run.finish(outputs)


def prepare_stage(config, volumes, prepared, *, with_truth: bool) -> None:
    folder = config.run_folder / "prepare"
    splits = {"train": ["train_0"], "validation": ["validation_0"], "test": TEST_PATIENTS}
    shards = []
    for split, names in splits.items():
        slices = [item for name in names for item in prepared[name][0]]
        shards += write_shards(folder, split, slices, config.data.slices_per_shard)
    write_manifest(
        folder,
        settings={},
        channels=["flair", "t1", "t1ce", "t2"],
        splits=splits,
        geometry={name: geometry for name, (_, geometry) in prepared.items()},
        shards=shards,
    )
    for name in TEST_PATIENTS:
        mask = volumes[name].mask
        if with_truth and mask is not None:
            write_nifti(folder / "truth" / f"{name}.nii.gz", mask, volumes[name].affine)
    finish(config, "prepare", {})


def training_stage(config: Config, stage: str) -> None:
    run = Run(config, stage, ())
    run.open()
    for step in (1, 2, 3):
        run.log(step, {"train/loss": 1 / step, "train/accuracy": 0.3 * step, "speed/steps": 5.0})
    run.log(3, {"validation/loss": 0.5})
    run.finish({})


def segment_stage(config, volumes, prepared) -> None:
    folder = config.run_folder / "segment"
    (folder / "scores").mkdir(parents=True)
    methods = ("gradcam", "gradient_map", "cdm", "cldf", SUPERVISED)
    for name in [*TEST_PATIENTS, "validation_0"]:
        slices, geometry = prepared[name]
        scores = scores_of(name, slices)
        scores.save(folder / "scores")
        for method in methods:
            native, allowed = native_scores(scores, method, geometry, 0.5)
            mask = object_mask(native, allowed, CUT, spacing=geometry.spacing)
            write_nifti(folder / "masks" / method / f"{name}.nii.gz", mask, volumes[name].affine)
    thresholds = dict.fromkeys(methods, CUT)
    rule = {
        "rule": "negatives",
        "negative_fraction": 0.01,
        "thresholds": thresholds,
        "mask_method": "cldf",
    }
    (folder / "thresholds.json").write_text(json.dumps(rule))
    finish(config, "segment", {})


def scores_of(name: str, slices: list[Slice]) -> PatientScores:
    """CLDF finds the object but for one patient and raises one false alarm; GradCAM and the
    gradient map find half of the object, CDM nothing; the reference raises no false alarm."""
    truth = np.stack([np.zeros((16, 16), bool) if s.mask is None else s.mask for s in slices])
    alarm = truth.copy()
    if name == ALARM:
        alarm[2:4, 10:13, 3:6] = True
    half = truth.copy()
    middle = np.flatnonzero(truth.any(axis=(0, 1)))[2:]
    half[:, :, middle] = False
    probability = np.where(truth.any(axis=(1, 2)), 0.9, 0.1)
    if name == MISSED:
        probability[:] = 0.1
    if name == ALARM:
        probability[2:4] = 0.8
    predicted = {
        "gradcam": half,
        "gradient_map": half,
        "cdm": np.zeros_like(truth),
        "cldf": alarm,
        SUPERVISED: truth,
    }
    return PatientScores(
        name,
        {method: (0.2 + 0.6 * mask).astype(np.float32) for method, mask in predicted.items()},
        probability.astype(np.float32),
        np.stack([(item.image > -1).any(axis=0) for item in slices]),
    )
