"""Native scans -> normalised slices in shards, with a patient-level split.

Each patient is prepared once and spooled to disk; an interrupted run goes on with the patients that
are missing or whose files have changed since. Masks give the slice labels here; after that only
diagnostics and the reference methods, which say so, read them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cldf_dist.config import Config, Data, to_plain
from cldf_dist.data.formats.nifti import write_nifti
from cldf_dist.data.readers import datasets
from cldf_dist.data.shards.adopt import adopt_shards
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.shards.write import write_manifest, write_shards
from cldf_dist.data.slices import Geometry, Slice, dequantise, prepare_volume, quantise, slice_key
from cldf_dist.data.splits import SPLITS, read_splits, split_patients
from cldf_dist.labels import SliceLabel
from cldf_dist.runs.run import DONE, Run, read_json
from cldf_dist.system.files import atomic_write, remove_leftovers
from cldf_dist.system.progress import progress


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Prepare the slices, or adopt shards that exist; returns their counts."""
    if config.data.shards:
        manifest = adopt_shards(config.data, run.folder)
        shutil.rmtree(run.folder / ".spool", ignore_errors=True)
        _check_labels(manifest["shards"])
        _tell_without_truth(run.folder / "truth", manifest["splits"]["test"])
        return _summary(manifest["splits"], manifest["shards"], labels="")
    return _prepare(config, run)


def _prepare(config: Config, run: Run) -> dict[str, Any]:
    names = datasets.patients(config.data)
    _check_before_reading(config.data, names)
    labels = _digest_of_labels(config.data)
    spool = run.folder / ".spool"
    spool.mkdir(exist_ok=True)
    remove_leftovers(run.folder)
    with progress("prepare", len(names), "patients") as bar:
        for name in names:
            fingerprint = datasets.source_fingerprint(config.data, name)
            if _spooled_fingerprint(spool / f"{name}.npz") != fingerprint:
                _spool_patient(config.data, name, spool, fingerprint)
            bar.advance(note=name)
    splits = _splits(config.data, names, spool)
    shards = []
    for split in SPLITS:
        slices = (item for name in splits[split] for item in _spooled(spool, name))
        shards += write_shards(run.folder, split, slices, config.data.slices_per_shard)
    _check_labels(shards)
    truth = _keep_truth(spool, run.folder / "truth", splits["test"])
    if _digest_of_labels(config.data) != labels:
        raise ValueError(f"data.labels: {config.data.labels} was changed meanwhile; run it again")
    write_manifest(
        run.folder,
        settings=to_plain(config.data),
        channels=datasets.channels(config.data),
        splits=splits,
        geometry={name: _geometry(spool, name) for name in names},
        shards=shards,
        truth=truth,
    )
    shutil.rmtree(spool)
    return _summary(splits, shards, labels)


def estimate(config: Config, folder: Path) -> dict[str, str]:
    """Counts and bytes, as `--dry-run` prints them before anything is written."""
    if config.data.shards:
        return {"shards": f"those of {config.data.shards}, staged when they are read"}
    names = datasets.patients(config.data)
    _check_before_reading(config.data, names)
    per_slice = len(datasets.channels(config.data)) * config.data.image_size**2 * 2
    return {
        "patients": str(len(names)),
        "size": f"about {per_slice / 1e6:.2f} MB per slice, twice that while it runs",
    }


def check_unchanged(config: Config, folder: Path) -> None:
    """Raise ValueError unless a finished `folder` was made with the labels and the splits that the
    files of data.labels and data.splits hold now.

    Without such files the settings count, which are compared elsewhere.
    """
    _check_labels_unchanged(config.data, folder)
    manifest = ShardSet(folder, on_damaged="skip").manifest
    made_with, path = manifest["settings"]["splits"], config.data.splits
    remedy = (
        f"({folder / 'manifest.json'} holds the splits of the run): restore it, take another "
        f"name=..., or delete {folder.parent}"
    )
    if not path:
        if made_with:
            raise ValueError(f"{folder} was split by data.splits={made_with}, now not set {remedy}")
        return
    held = manifest["splits"]
    try:
        said = read_splits(path, [name for split in SPLITS for name in held[split]])
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}; {folder} was split otherwise {remedy}") from error
    moved = [name for split in SPLITS for name in said[split] if name not in set(held[split])]
    if moved:
        raise ValueError(
            f"data.splits: {path} no longer says what {folder} was made with: "
            f"{', '.join(moved[:5])} changed the split {remedy}"
        )


def _check_labels_unchanged(settings: Data, folder: Path) -> None:
    made_with = read_json(folder / DONE).get("labels_sha256", "")
    if _digest_of_labels(settings) != made_with:
        now = f"{settings.labels} has changed since" if settings.labels else "it is not set now"
        raise ValueError(
            f"data.labels: {folder} was made with other labels, {now}: restore the file, take "
            f"another name=..., or delete {folder.parent}"
        )


def _digest_of_labels(settings: Data) -> str:
    """Of the file's content; empty without one."""
    if not settings.labels:
        return ""
    try:
        return hashlib.sha256(Path(settings.labels).read_bytes()).hexdigest()
    except OSError as error:
        raise FileNotFoundError(
            f"data.labels: cannot read {settings.labels}: {error.strerror}"
        ) from error


def _check_before_reading(settings: Data, names: Sequence[str]) -> None:
    """Refuse what names and file listings give away, before hours of reading."""
    datasets.check_listing(settings, names)
    if settings.splits:
        read_splits(settings.splits, names)
    else:  # whether there are enough patients does not depend on the values to balance
        _split(settings, dict.fromkeys(names, 0.0))


def _spooled_fingerprint(path: Path) -> str:
    """The fingerprint of the source that a patient was spooled from; empty without a readable
    spool."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return str(stored["fingerprint"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return ""


def _spool_patient(settings: Data, name: str, spool: Path, fingerprint: str) -> None:
    volume = datasets.read_patient(settings, name)
    slices, geometry = prepare_volume(volume, settings)
    if not slices:
        raise ValueError(
            f"{name}: no slice is kept, its body covers less than data.min_body_fraction="
            f"{settings.min_body_fraction} of every slice; lower that, or take the patient "
            "out of the data"
        )
    arrays: dict[str, Any] = {
        "fingerprint": np.array(fingerprint),
        "images": np.stack([quantise(item.image) for item in slices]),
        "labels": np.array([item.label for item in slices]),
        "geometry": np.array(json.dumps(geometry.to_json())),
        "positive_share": np.array(_positive_share(slices)),
    }
    native_mask = spool / f"{name}.nii.gz"
    native_mask.unlink(missing_ok=True)
    if volume.mask is not None:
        write_nifti(native_mask, volume.mask.astype(np.uint8), volume.affine)
        arrays["masks"] = np.stack([item.mask for item in slices if item.mask is not None])
    with atomic_write(spool / f"{name}.npz") as file:
        np.savez(file, **arrays)


def _spooled(spool: Path, name: str) -> Iterator[Slice]:
    with np.load(spool / f"{name}.npz", allow_pickle=False) as stored:
        geometry = Geometry.from_json(json.loads(str(stored["geometry"])))
        images, labels = stored["images"], stored["labels"]
        masks = stored.get("masks")
    for row, index in enumerate(geometry.indices):
        yield Slice(
            key=slice_key(name, index),
            patient=name,
            index=index,
            label=int(labels[row]),
            image=dequantise(images[row]),
            mask=None if masks is None else masks[row],
        )


def _geometry(spool: Path, name: str) -> Geometry:
    with np.load(spool / f"{name}.npz", allow_pickle=False) as stored:
        return Geometry.from_json(json.loads(str(stored["geometry"])))


def _positive_share(slices: Sequence[Slice]) -> float:
    return float(np.mean([item.label == SliceLabel.POSITIVE for item in slices]))


def _splits(settings: Data, names: Sequence[str], spool: Path) -> dict[str, list[str]]:
    if settings.splits:
        return read_splits(settings.splits, names)
    strata = {}
    for name in names:
        with np.load(spool / f"{name}.npz", allow_pickle=False) as stored:
            strata[name] = float(stored["positive_share"])
    return _split(settings, strata)


def _split(settings: Data, strata: Mapping[str, float]) -> dict[str, list[str]]:
    return split_patients(
        strata, settings.validation_fraction, settings.test_fraction, settings.split_seed
    )


def _keep_truth(spool: Path, folder: Path, patients: Sequence[str]) -> dict[str, str]:
    """Copy the masks; the sha256 of each."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.nii.gz"):
        old.unlink()
    digests = {}
    for name in patients:
        source = spool / f"{name}.nii.gz"
        if source.exists():
            shutil.copyfile(source, folder / source.name)
            digests[name] = hashlib.sha256(source.read_bytes()).hexdigest()
    _tell_without_truth(folder, patients)
    return digests


def _tell_without_truth(folder: Path, patients: Sequence[str]) -> None:
    if not any(folder.iterdir()):
        print(
            f"prepare: none of the {len(patients)} test patients has a mask; evaluate will have "
            "nothing to score",
            file=sys.stderr,
        )


def _check_labels(shards: Sequence[dict[str, Any]]) -> None:
    for split in ("train", "validation"):
        positive, negative = (
            _count(shards, split, SliceLabel.POSITIVE),
            _count(shards, split, SliceLabel.NEGATIVE),
        )
        if not positive or not negative:
            unknown = _count(shards, split, SliceLabel.UNLABELLED)
            also = f", and {unknown} that neither a mask nor a list tells of" if unknown else ""
            raise ValueError(
                f"the {split} split has {positive} slices with and {negative} without the object"
                f"{also}; both kinds are needed: check the masks, data.min_object_pixels and "
                "data.splits"
            )


def _summary(
    splits: Mapping[str, Sequence[str]], shards: Sequence[dict[str, Any]], labels: str
) -> dict[str, Any]:
    """The numbers that DONE keeps; `labels` is the digest of the labels file."""
    return {
        "patients": {split: len(splits[split]) for split in SPLITS},
        "slices": {
            split: sum(s["num_slices"] for s in shards if s["split"] == split) for split in SPLITS
        },
        "labels_sha256": labels,
        "positive_slices": {split: _count(shards, split, SliceLabel.POSITIVE) for split in SPLITS},
    }


def _count(shards: Sequence[dict[str, Any]], split: str, label: int) -> int:
    return sum(
        sample["label"] == label
        for shard in shards
        if shard["split"] == split
        for sample in shard["samples"]
    )
