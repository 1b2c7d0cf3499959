"""Several objects by one command: a binary run for each, and their masks in one label map.

`data.object=liver,spleen` (or `each`: all that the data set names) becomes the runs
`<name>/liver` and `<name>/spleen`; what they found lies together in `<name>/multi_object`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cldf_dist.config import EACH, Config, Data, Mark, marked
from cldf_dist.data.formats.nifti import Affine, read_nifti, write_nifti
from cldf_dist.data.readers.datasets import objects, patients
from cldf_dist.data.readers.objects import object_names
from cldf_dist.data.splits import split_patients
from cldf_dist.runs.run import read_json, write_atomically
from cldf_dist.scoring.masks import FloatArray, Mask
from cldf_dist.system.distributed import processes

MASK = "_mask.nii.gz"  # how the names of masks of new scans end


def one_per_object(config: Config) -> list[Config]:
    """The configurations to run: one per object of `data.object`; itself where it is only one.

    Raises ValueError for a name that the data set does not know, before any of them runs.
    """
    names = [name.strip() for name in config.data.object.split(",")]
    if len(names) == 1 and names != [EACH]:
        return [config]
    if names == [EACH]:
        names = list(objects(config.data))
    elif not config.input:  # new scans come without the data set
        for name in names:
            object_names(name, objects(config.data))
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
    path = (config.run_folder / "splits.json").absolute()
    if processes().is_main:
        _keep_split(path, parts[0].data)
    data = (dataclasses.replace(part.data, splits=str(path)) for part in parts)
    return [dataclasses.replace(part, data=of_part) for part, of_part in zip(parts, data)]


def _keep_split(path: Path, settings: Data) -> None:
    """Draw the split, or raise ValueError where another one was drawn before."""
    drawn_by = {key: getattr(settings, key) for key in marked(Data, Mark.DRAWS_SPLIT)}
    about = path.with_name("splits_drawn_by.json")
    if path.exists() and about.exists():
        if read_json(about) != drawn_by:
            raise ValueError(
                f"{path} was drawn with {read_json(about)}, not {drawn_by}; take another name=..., "
                f"or delete {path.parent}"
            )
        return
    splits = split_patients(
        dict.fromkeys(patients(settings), 0.0),
        settings.validation_fraction,
        settings.test_fraction,
        settings.split_seed,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(splits, indent=1))
    write_atomically(about, json.dumps(drawn_by, indent=1))


def merge_runs(config: Config, parts: Sequence[Config]) -> Path:
    """Write the label maps of the test patients of finished runs; the folder they are in."""
    folders = {part.data.object: part.run_folder / "segment" for part in parts}
    files = sorted(
        set.intersection(
            *({file.name for file in (f / "probability").iterdir()} for f in folders.values())
        )
    )
    target = config.run_folder / "multi_object"
    methods = {name: mask_method(folder) for name, folder in folders.items()}
    for file in files:
        found = {
            name: _found(folder / "masks" / methods[name] / file, folder / "probability" / file)
            for name, folder in folders.items()
        }
        _write_label_map(target / "masks" / file, found)
    _write_names(target / "labels.json", list(folders))
    return target


def mask_method(segment: Path) -> str:
    """The method whose masks a finished run stands for."""
    return str(read_json(segment / "thresholds.json")["mask_method"])


def merge_new_scans(
    config: Config, parts: Sequence[Config], written: Sequence[Sequence[Path]]
) -> list[Path]:
    """Write a label map for each new scan that every run has segmented now; their files.

    `written` are the files of each of the `parts`.
    """
    folders = {part.data.object: Path(part.output) for part in parts}
    names = set.intersection(
        *({f.name.removesuffix(MASK) for f in files if f.name.endswith(MASK)} for files in written)
    )
    targets = [Path(config.output) / f"{name}_labels.nii.gz" for name in sorted(names)]
    for target in targets:
        name = target.name.removesuffix("_labels.nii.gz")
        found = {
            label: _found(folder / f"{name}{MASK}", folder / f"{name}_probability.nii.gz")
            for label, folder in folders.items()
        }
        _write_label_map(target, found)
    if targets:
        _write_names(Path(config.output) / "labels.json", list(folders))
    return targets


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
