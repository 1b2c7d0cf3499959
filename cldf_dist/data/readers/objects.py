"""The labelled object that is the target: `data.object`, and the mask it makes of a label array."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_dist.config import Data

USUAL_OBJECTS = {"brats": "whole_tumour", "chaos": "liver", "phantom": "lesion"}
LABEL_TOLERANCE = 0.01  # a label saved as a scaled float comes back as 4.00000024


def object_title(settings: Data) -> str:
    """The target in words, such as "whole tumour"."""
    name = settings.object or USUAL_OBJECTS.get(settings.dataset, "object")
    return name.replace("_", " ").replace("+", " and ")


def object_names(name: str, known: Collection[str], *, usual: str = "") -> tuple[str, ...]:
    """The names in `data.object`; `usual` where it is empty. ValueError unless all are `known`."""
    if not known:
        raise ValueError('labels must name at least one object, such as {"tumour": 1}; got none')
    parts = tuple((name or usual).split("+"))
    unknown = [part for part in parts if part not in known]
    if unknown:
        said = f"got {name!r}" if name else "it is empty"
        raise ValueError(
            f"data.object must be one of {', '.join(known)}, or several joined by +; {said}"
        )
    return parts


def label_values(name: str, labels: Mapping[str, Collection[int]], *, usual: str = "") -> set[int]:
    """The label values that `data.object` names, by a table of names to values."""
    parts = object_names(name, labels, usual=usual)
    return {value for part in parts for value in labels[part]}


def mask_of_labels(
    labels: npt.NDArray[Any], path: Path, *, wanted: Collection[int], allowed: Collection[int]
) -> npt.NDArray[np.bool_]:
    """The mask of the rounded labels that are `wanted`; ValueError for one not `allowed`."""
    rounded = np.rint(labels)
    wrong = ~np.isin(rounded, list(allowed)) | (np.abs(labels - rounded) > LABEL_TOLERANCE)
    if wrong.any():
        values = np.unique(labels[wrong])[:5].tolist()
        raise ValueError(
            f"{path}: labels must be one of {sorted(allowed)}, found {values} in "
            f"{int(wrong.sum())} voxels; repair the file or leave the patient out"
        )
    return np.isin(rounded, list(wanted))
