"""The entries of a data set's folders that count, their order, and the listing of faults."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NIFTI_ENDINGS = (".nii.gz", ".nii")
LEFT_BEHIND = (".", "__MACOSX")  # how hidden entries begin, and those that archivers add
FAULTS_SHOWN = 5  # in one error


def is_visible(path: Path) -> bool:
    """False for hidden entries and for those that other systems leave behind."""
    return not path.name.startswith(LEFT_BEHIND)


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in `folder`, sorted."""
    return sorted(item for item in folder.iterdir() if item.is_dir() and is_visible(item))


def nifti_files(folder: Path) -> list[Path]:
    """The visible entries with a name of NIfTI files, sorted; broken links and folders too."""
    found = (item for item in folder.iterdir() if item.name.endswith(NIFTI_ENDINGS))
    return sorted(item for item in found if is_visible(item))


def natural_order(file: Path) -> tuple[Any, ...]:
    """A sort key: numbers in the name count as numbers."""
    parts = re.split(r"([0-9]+)", file.name)  # text and digits by turns
    numbers = [int(part) if index % 2 else part for index, part in enumerate(parts)]
    return (numbers, file.name)


def first_faults(faults: Sequence[str]) -> str:
    """The first faults in one line, and how many more there are."""
    more = len(faults) - FAULTS_SHOWN
    return "; ".join([*faults[:FAULTS_SHOWN], *([f"and {more} more"] if more > 0 else [])])
