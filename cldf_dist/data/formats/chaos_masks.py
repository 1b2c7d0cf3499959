"""The masks of CHAOS: one PNG per slice, whose gray values name the organs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cldf_dist.data.formats.listing import is_visible, natural_order
from cldf_dist.data.readers.objects import USUAL_OBJECTS, label_values, object_names
from cldf_dist.data.slices import Geometry
from cldf_dist.system.files import atomic_write

Mask = npt.NDArray[np.bool_]

USUAL_OBJECT = USUAL_OBJECTS["chaos"]
# gray values by the folder of the scanner; public readers of the data set agree on the ranges of MR
GRAY_VALUES: dict[str, Mapping[str, Sequence[int]]] = {
    "MR": {
        "liver": range(56, 71),
        "right_kidney": range(111, 136),
        "left_kidney": range(176, 201),
        "spleen": range(241, 256),
    },
    "CT": {"liver": (1, 255)},  # 1 where a tool saved truth values
}
WRITTEN_VALUES = {
    "MR": {"liver": 63, "right_kidney": 126, "left_kidney": 189, "spleen": 252},
    "CT": {"liver": 255},
}
BY_SIDE = {"right_kidney", "left_kidney"}  # the union whose parts the patient's side tells apart


def mask_files(folder: Path) -> list[Path]:
    """The PNG files in `folder`, numbers in their names in numerical order; none without it."""
    if not folder.is_dir():
        return []
    found = (file for file in folder.iterdir() if file.suffix.lower() == ".png")
    return sorted(filter(is_visible, found), key=natural_order)


def read_masks(
    files: Sequence[Path], *, scanner: str, object_name: str, shape: tuple[int, int]
) -> Mask:
    """The object in the masks, one file per slice: (x, y, slices).

    `scanner` is MR or CT, `object_name` is `data.object`, `shape` (x, y) is that of the slices.
    Raises ValueError, with the file, for another size, an unreadable or coloured file and a gray
    value that names no organ.
    """
    table = GRAY_VALUES[scanner]
    wanted = list(label_values(object_name, table, usual=USUAL_OBJECT))
    return np.stack([np.isin(_gray_values(file, table, shape), wanted) for file in files], axis=2)


def can_be_written(object_name: str, *, scanner: str) -> bool:
    """True where gray values can hold the object: one organ, or both kidneys."""
    parts = object_names(object_name, GRAY_VALUES[scanner], usual=USUAL_OBJECT)
    return len(parts) == 1 or set(parts) == BY_SIDE


def write_chaos_masks(folder: Path, mask: Mask, geometry: Geometry, *, object_name: str) -> None:
    """Write a mask (x, y, slices) as PNG files under `folder`, in the data set's own layout.

    `geometry` is that of the scan, as `prepare_volume` gives it: it holds the files' names. Of the
    joined kidneys, what lies to the patient's right of the body's middle becomes right kidney.
    Each file appears whole or not at all. Raises ValueError for any other union of organs.
    """
    if mask.shape != geometry.shape or len(geometry.mask_names) != mask.shape[2]:
        raise ValueError(
            f"{geometry.patient}: the mask must be {geometry.shape} with a file name per slice, "
            f"got {mask.shape} and {len(geometry.mask_names)} names; prepare the CHAOS data again"
        )
    scanner = geometry.mask_names[0].split("/")[0]
    values = _written_values(mask, geometry, object_name, scanner)
    for number, name in enumerate(geometry.mask_names):
        _write_png(folder / name, values[:, :, number].T)


def _written_values(
    mask: Mask, geometry: Geometry, object_name: str, scanner: str
) -> npt.NDArray[np.uint8]:
    """Gray values (x, y, slices)."""
    gray = WRITTEN_VALUES[scanner]
    if not can_be_written(object_name, scanner=scanner):
        raise ValueError(
            f"the masks of CHAOS have one gray value per organ and none for {object_name}; "
            "take the NIfTI masks, or a run for each organ"
        )
    parts = object_names(object_name, gray, usual=USUAL_OBJECT)
    if len(parts) == 1:
        return np.where(mask, gray[parts[0]], 0).astype(np.uint8)
    sides = np.where(_right_side(geometry), gray["right_kidney"], gray["left_kidney"])
    return np.where(mask, sides, 0).astype(np.uint8)


def _right_side(geometry: Geometry) -> Mask:
    """A mask of the voxels to the patient's right of the body's middle; has the file's number of
    axes and is as long as the file along the one from right to left."""
    axis = next(number for number, letter in enumerate(geometry.axes) if letter in "LR")
    length = geometry.shape[axis]
    to_left = np.arange(length) + 0.5  # voxels from the array's right side
    if geometry.axes[axis] == "R":
        to_left = length - to_left
    shape = [1, 1, 1]
    shape[axis] = length
    return np.asarray(to_left < (geometry.box[0] + geometry.box[1]) / 2).reshape(shape)


def _gray_values(
    file: Path, table: Mapping[str, Sequence[int]], shape: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """(x, y), nothing but the values of the table and 0."""
    values = _read_png(file).T
    if values.shape != shape:
        raise ValueError(
            f"{file}: a mask must have the size of its slice, {shape[0]} columns and {shape[1]} "
            f"rows, got {values.shape[0]} and {values.shape[1]}; fetch the original mask"
        )
    known = [0, *(gray for grays in table.values() for gray in grays)]
    wrong = ~np.isin(values, known)
    if wrong.any():
        rule = ", ".join(f"{_span(grays)} {organ}" for organ, grays in table.items())
        found = np.unique(values[wrong])[:5].tolist()
        raise ValueError(
            f"{file}: gray values must be 0 or {rule}; found {found} in {int(wrong.sum())} pixels, "
            "as interpolated edges have them; fetch the original mask"
        )
    return values


def _span(values: Sequence[int]) -> str:
    if isinstance(values, range):
        return f"{values[0]}-{values[-1]}"
    return " or ".join(str(value) for value in values)


def _read_png(file: Path) -> npt.NDArray[np.uint8]:
    """(rows, columns), 0 to 255; 0 and 1 for a 1-bit file."""
    try:
        with Image.open(file, formats=["PNG"]) as png:
            mode, values = png.mode, np.asarray(png)
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is no readable PNG file: {reason}; fetch it again") from error
    if mode in ("RGB", "RGBA") and (values[..., :3] == values[..., :1]).all():
        values, mode = values[..., 0], "L"
    if mode not in ("1", "L"):
        raise ValueError(
            f"{file}: a mask must be a PNG of 1 or 8 bits of gray, or of colours with red, green "
            f"and blue alike, got {mode}; save it as 8-bit gray"
        )
    return values.astype(np.uint8)


def _write_png(path: Path, values: npt.NDArray[np.uint8]) -> None:
    """(rows, columns) as 8 bits of gray; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        Image.fromarray(np.ascontiguousarray(values)).save(file, format="PNG")
