"""Several objects by one command: a binary run for each, and their masks in one label map.

`data.object=liver,spleen` (or `each`: all that the data set names) becomes the runs
`<name>/liver` and `<name>/spleen`; what they found lies together in `<name>/joint`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cldf_dist.config import Config
from cldf_dist.data.datasets import objects, patients
from cldf_dist.data.nifti import Affine, read_nifti, write_nifti
from cldf_dist.data.splits import split_patients
from cldf_dist.processes import processes
from cldf_dist.run import write_atomically
from cldf_dist.stages.masks import FloatArray, Mask

EACH = "each"


def one_per_object(config: Config) -> list[Config]:
    """The configurations to run: one per object of `data.object`; itself where it is only one."""
    names = config.data.object.split(",")
    if names == [EACH]:
        names = list(objects(config.data))
    elif len(names) == 1:
        return [config]
    return [
        dataclasses.replace(
            config,
            name=f"{config.name}/{name}",
            output=str(Path(config.output) / name) if config.output else "",
            data=dataclasses.replace(config.data, object=name),
        )
        for name in names
    ]


def with_one_split(config: Config, parts: Sequence[Config]) -> list[Config]:
    """The same runs with the same patients in each split, or label maps could not be made.

    Where `data.splits` is not set, a split is drawn once, as `prepare` would but without regard to
    the share of positive slices, and kept in the folder of the study.
    """
    if config.data.splits or len(parts) == 1:
        return list(parts)
    path = (config.run_folder / "splits.json").resolve()
    if processes().is_main and not path.exists():
        settings = parts[0].data
        splits = split_patients(
            dict.fromkeys(patients(settings), 0.0),
            settings.validation_fraction,
            settings.test_fraction,
            settings.split_seed,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(splits, indent=1))
    data = (dataclasses.replace(part.data, splits=str(path)) for part in parts)
    return [dataclasses.replace(part, data=of_part) for part, of_part in zip(parts, data)]


def join_runs(config: Config, parts: Sequence[Config]) -> Path:
    """Write the label maps of the test patients of finished runs; the folder they are in."""
    folders = {part.data.object: part.run_folder / "segment" for part in parts}
    files = sorted(
        set.intersection(
            *({file.name for file in (f / "probability").iterdir()} for f in folders.values())
        )
    )
    target = config.run_folder / "joint"
    for file in files:
        found = {
            name: _found(folder / "masks" / "cldf" / file, folder / "probability" / file)
            for name, folder in folders.items()
        }
        _write_label_map(target / "masks" / file, found)
    _write_names(target / "labels.json", list(folders))
    return target


def join_new_scans(config: Config, parts: Sequence[Config]) -> list[Path]:
    """Write a label map for each new scan that all runs segmented; their files."""
    folders = {part.data.object: Path(part.output) for part in parts}
    ending = "_mask.nii.gz"
    names = sorted(
        set.intersection(
            *(
                {file.name.removesuffix(ending) for file in folder.glob(f"*{ending}")}
                for folder in folders.values()
            )
        )
    )
    written = [Path(config.output) / f"{name}_labels.nii.gz" for name in names]
    for name, target in zip(names, written):
        found = {
            label: _found(folder / f"{name}{ending}", folder / f"{name}_probability.nii.gz")
            for label, folder in folders.items()
        }
        _write_label_map(target, found)
    _write_names(Path(config.output) / "labels.json", list(folders))
    return written


def _found(mask: Path, probability: Path) -> tuple[Mask, FloatArray, Affine]:
    values, affine = read_nifti(mask)
    return values > 0, read_nifti(probability)[0].astype(np.float32), affine


def _write_label_map(path: Path, found: Mapping[str, tuple[Mask, FloatArray, Affine]]) -> None:
    """Label k where the k-th object's mask is; where masks overlap the most probable object."""
    chances = np.stack([np.where(mask, chance, -1.0) for mask, chance, _ in found.values()])
    labels = np.where(chances.max(axis=0) >= 0, 1 + chances.argmax(axis=0), 0)
    affine = next(iter(found.values()))[2]
    write_nifti(path, labels.astype(np.uint8), affine)


def _write_names(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"background": 0} | {name: number for number, name in enumerate(names, 1)}
    write_atomically(path, json.dumps(table, indent=1))
