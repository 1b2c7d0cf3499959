"""The conversion of volumes to normalised axial slices, and of slice maps back to the volume."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import sparse

from cldf_dist.config import Data
from cldf_dist.data.formats.nifti import Affine, Volume, voxel_size
from cldf_dist.labels import SliceLabel

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

OUTSIDE = -1.0  # the value of every channel outside the body
STEPS = 32767  # int16 steps from 0 to 1
DARKEST = np.float32(-(STEPS - 1) / STEPS)  # lowest value inside the body, one step above OUTSIDE
ORIENTATION = "LPS"  # of the axes that slices are taken from: to the left, to the back, to the head
CT_WINDOW = (-150.0, 250.0)  # Hounsfield units: the usual window for abdominal soft tissue
MARGIN = 0.04  # of the body's longer side, kept free around it
NORMAL_IQR = 1.349  # interquartile range of a normal distribution of standard deviation 1
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Slice:
    """One prepared axial slice: rows run to the back, columns to the patient's left."""

    key: str
    patient: str
    index: int  # slice number along the third axis of the LPS-oriented volume
    label: int  # a `SliceLabel`
    image: Floats  # (channels, height, width) in [-1, 1]; exactly -1 outside the body
    mask: Mask | None  # (height, width)


@dataclass(frozen=True)
class Geometry:
    """The place of a volume's slices in its file, for mapping them back onto its voxels."""

    patient: str
    shape: tuple[int, int, int]  # (x, y, slices) of the file
    affine: tuple[tuple[float, ...], ...]  # (4, 4) of the file
    spacing: tuple[float, float, float]  # mm, along the file's axes
    axes: str  # orientation of the file's axes, such as "LPS"
    box: tuple[int, int, int, int]  # x0, x1, y0, y1 of the LPS-oriented array; may exceed it
    image_size: int
    indices: tuple[int, ...]  # the slices that were kept
    mask_names: tuple[str, ...] = ()  # per slice of the file: its mask in the data set's own layout
    hounsfield: bool = False  # the file's values are Hounsfield units

    def to_json(self) -> dict[str, Any]:
        """The geometry as JSON types."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Geometry":
        """The geometry of `to_json`'s result."""
        names = ("shape", "spacing", "box", "indices", "mask_names")
        lists = {name: tuple(record[name]) for name in names if name in record}
        affine = tuple(tuple(row) for row in record["affine"])
        return cls(**{**record, **lists, "affine": affine})


def slice_key(patient: str, index: int) -> str:
    """The name of a slice, unique in its data set, in shards and in the cache.

    Raises ValueError for a patient name with other characters than those of KEY_PATTERN.
    """
    key = f"{patient}_{index:04d}"
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(
            f"patient names must consist of A-Z, a-z, 0-9, '_' and '-' and be shorter than 60, "
            f"got {patient!r}; rename the folder"
        )
    return key


def body_mask(images: Floats) -> Mask:
    """True within the body: (..., height, width) of images (..., channels, height, width)."""
    return np.asarray((images > OUTSIDE).any(axis=-3))


def prepare_volume(volume: Volume, settings: Data) -> tuple[list[Slice], Geometry]:
    """The normalised square slices of a scan around the body, and their geometry.

    Per channel, z = (v - median) / (IQR / 1.349) within the body, clipped to
    [clip_low, clip_high] and mapped to [-1, 1]. With a window (`data.window`, or CT) the stored
    values between its ends are mapped in place of z. Raises ValueError, with the source's name,
    where there is no body or a channel is constant.
    """
    transform = _to_lps(_orientation_of(volume.affine))
    inside = _reorient(volume.body_mask, transform)
    if not inside.any():
        where = volume.sources[0] if volume.sources else volume.patient
        raise ValueError(
            f"{where}: the scan is empty, every voxel is background; fetch it again, leave it out, "
            "or see data.subject"
        )
    spacing = voxel_size(volume.affine @ nib.orientations.inv_ornt_aff(transform, inside.shape))
    geometry = _geometry(volume, settings.image_size, _square_around(inside, spacing))
    weight = _resample(inside.astype(np.float64), geometry)
    body = weight > 0.5
    channels = []
    for number, channel in enumerate(volume.image):
        name = volume.sources[number] if volume.sources else f"{volume.patient}, channel {number}"
        window = settings.window or (CT_WINDOW if volume.hounsfield else ())
        normal = _normalise(_reorient(channel, transform), inside, settings, window, name)
        mean = _resample(normal * inside, geometry) / np.maximum(weight, 0.5)
        channels.append(np.where(body, np.clip(mean, DARKEST, 1), OUTSIDE).astype(np.float32))
    mask = None if volume.mask is None else _reorient(volume.mask, transform)
    small_mask = None if mask is None else _resample(mask.astype(np.float64), geometry) > 0.5

    labels = _slice_labels(volume, mask, transform, settings.min_object_pixels)
    fraction = body.mean(axis=(0, 1))
    kept = np.flatnonzero(fraction >= settings.min_body_fraction).tolist()
    geometry = dataclasses.replace(geometry, indices=tuple(kept))
    slices = [
        Slice(
            key=slice_key(volume.patient, index),
            patient=volume.patient,
            index=index,
            label=labels[index],
            image=np.stack([channel[:, :, index].T for channel in channels]),
            mask=None if small_mask is None else small_mask[:, :, index].T.copy(),
        )
        for index in kept
    ]
    return slices, geometry


def to_native(maps: Floats, geometry: Geometry, fill: float = 0.0) -> Floats:
    """Maps of the kept slices resampled to the file's grid (x, y, slices) and orientation.

    `maps` is (num_slices, height, width), in the order of `geometry.indices`. Voxels outside the
    box and in dropped slices are `fill`. Raises ValueError for maps of another shape.
    """
    size = geometry.image_size
    expected = (len(geometry.indices), size, size)
    if maps.shape != expected:
        raise ValueError(f"{geometry.patient}: maps must be {expected}, got {maps.shape}")
    file_orientation = nib.orientations.axcodes2ornt(geometry.axes)
    shape = _lps_shape(geometry)
    x0, x1, y0, y1 = geometry.box
    columns, rows = resampling_weights(size, x1 - x0), resampling_weights(size, y1 - y0)
    volume = np.full(shape, fill, np.float32)
    left, right, front, back = max(x0, 0), min(x1, shape[0]), max(y0, 0), min(y1, shape[1])
    for image, index in zip(maps, geometry.indices):
        square = columns @ (rows @ image.astype(np.float64)).T  # (x, y)
        volume[left:right, front:back, index] = square[
            left - x0 : right - x0, front - y0 : back - y0
        ]
    back_transform = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(ORIENTATION), file_orientation
    )
    return np.ascontiguousarray(_reorient(volume, back_transform))


def resampling_weights(num_in: int, num_out: int) -> Any:
    """The sparse (num_out, num_in) matrix of 1-D resampling; each row sums to 1.

    Area averaging when shrinking, linear interpolation when enlarging. The outer edges of both
    grids coincide.
    """
    if num_out < num_in:
        edges = np.arange(num_out + 1) * (num_in / num_out)
        pixel = np.arange(num_in)
        start = np.maximum(edges[:-1, None], pixel)
        stop = np.minimum(edges[1:, None], pixel + 1)
        overlap = np.clip(stop - start, 0, None)
        return sparse.csr_array(overlap / overlap.sum(axis=1, keepdims=True))
    centre = np.clip((np.arange(num_out) + 0.5) * (num_in / num_out) - 0.5, 0, num_in - 1)
    distance = np.abs(centre[:, None] - np.arange(num_in))
    return sparse.csr_array(np.clip(1 - distance, 0, None))


def quantise(image: Floats) -> npt.NDArray[np.int16]:
    """Values in [-1, 1] as int16; -1 is kept exactly."""
    return np.asarray(np.rint(image * np.float32(STEPS)), np.int16)


def dequantise(stored: npt.NDArray[np.int16]) -> Floats:
    """The values that `quantise` rounded, to within half a step."""
    return np.asarray(stored / np.float32(STEPS), np.float32)


def _orientation_of(affine: Affine) -> npt.NDArray[Any]:
    return np.asarray(nib.orientations.io_orientation(affine))


def _to_lps(orientation: npt.NDArray[Any]) -> npt.NDArray[Any]:
    lps = nib.orientations.axcodes2ornt(ORIENTATION)
    return np.asarray(nib.orientations.ornt_transform(orientation, lps))


def _reorient(array: npt.NDArray[Any], transform: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(nib.orientations.apply_orientation(array, transform))


def _lps_shape(geometry: Geometry) -> tuple[int, int, int]:
    transform = _to_lps(nib.orientations.axcodes2ornt(geometry.axes))
    shape = [0, 0, 0]
    for axis, target in enumerate(transform[:, 0].astype(int)):
        shape[target] = geometry.shape[axis]
    return (shape[0], shape[1], shape[2])


def _geometry(volume: Volume, image_size: int, box: tuple[int, int, int, int]) -> Geometry:
    x, y, z = volume.body_mask.shape
    return Geometry(
        patient=volume.patient,
        shape=(x, y, z),
        affine=tuple(tuple(row) for row in np.asarray(volume.affine, float).tolist()),
        spacing=volume.spacing,
        axes="".join(nib.orientations.ornt2axcodes(_orientation_of(volume.affine))),
        box=box,
        image_size=image_size,
        indices=(),
        mask_names=volume.mask_names,
        hounsfield=volume.hounsfield,
    )


def _square_around(inside: Mask, spacing: tuple[float, float, float]) -> tuple[int, int, int, int]:
    """The box around the body with its margin: equal sides in mm, to the nearest voxel."""
    spans = [np.flatnonzero(inside.any(axis=axes)) for axes in ((1, 2), (0, 2))]
    lows = [int(span[0]) for span in spans]
    highs = [int(span[-1]) + 1 for span in spans]
    side_mm = max((high - low) * mm for low, high, mm in zip(lows, highs, spacing))
    side_mm *= 1 + 2 * MARGIN
    lengths = [
        max(int(np.ceil(side_mm / mm)), high - low) for low, high, mm in zip(lows, highs, spacing)
    ]
    starts = [(low + high - length) // 2 for low, high, length in zip(lows, highs, lengths)]
    return (starts[0], starts[0] + lengths[0], starts[1], starts[1] + lengths[1])


def _resample(volume: npt.NDArray[np.float64], geometry: Geometry) -> npt.NDArray[np.float64]:
    """The box of an LPS-oriented volume on (image_size, image_size, slices); 0 beyond the array."""
    size = geometry.image_size
    x0, x1, y0, y1 = geometry.box
    num_x, num_y, num_slices = volume.shape
    along_x = resampling_weights(x1 - x0, size)[:, max(-x0, 0) : num_x - x0]
    along_y = resampling_weights(y1 - y0, size)[:, max(-y0, 0) : num_y - y0]
    crop = volume[max(x0, 0) : x1, max(y0, 0) : y1]  # (x, y, slices)
    crop = (along_x @ crop.reshape(crop.shape[0], -1)).reshape(size, -1, num_slices)
    crop = np.moveaxis(crop, 1, 0)  # (y, x, slices)
    crop = (along_y @ crop.reshape(crop.shape[0], -1)).reshape(size, size, num_slices)
    return np.moveaxis(crop, 1, 0)


def _normalise(
    channel: npt.NDArray[Any],
    inside: Mask,
    settings: Data,
    window: tuple[float, ...],
    name: str,
) -> npt.NDArray[np.float64]:
    if window:
        low, high = window
        values = np.clip(channel.astype(np.float64), low, high)
        if values[inside].min() == values[inside].max():
            raise ValueError(
                f"{name}: all of the body lies on one side of the window {low:g} to {high:g} "
                "(data.window); a channel must have contrast: set the window or leave the scan out"
            )
        return np.asarray(2 * (values - low) / (high - low) - 1)
    first, median, third = np.percentile(channel[inside], (25, 50, 75))
    if third <= first:
        raise ValueError(
            f"{name}: half of the body's voxels have the same value, {median}; "
            f"a channel must have contrast: repair the file or leave the scan out"
        )
    z = (channel - median) / ((third - first) / NORMAL_IQR)
    z = np.clip(z, settings.clip_low, settings.clip_high)
    return np.asarray(2 * (z - settings.clip_low) / (settings.clip_high - settings.clip_low) - 1)


def _slice_labels(
    volume: Volume, mask: Mask | None, transform: npt.NDArray[Any], min_object_pixels: int
) -> list[int]:
    """The label of every slice of the LPS-oriented volume, from the list of labels or the mask."""
    axis = int(np.flatnonzero(transform[:, 0] == 2)[0])
    num_slices = volume.body_mask.shape[axis]
    if volume.slice_labels is None:
        return [_slice_label(mask, index, min_object_pixels) for index in range(num_slices)]
    if len(volume.slice_labels) != num_slices:
        raise ValueError(
            f"{volume.patient}: {num_slices} slices must have as many labels, "
            f"got {len(volume.slice_labels)}"
        )
    return [int(label) for label in volume.slice_labels[:: int(transform[axis, 1])]]


def _slice_label(mask: Mask | None, index: int, min_object_pixels: int) -> int:
    if mask is None:
        return SliceLabel.UNLABELLED
    num_pixels = int(mask[:, :, index].sum())
    if num_pixels >= min_object_pixels:
        return SliceLabel.POSITIVE
    return SliceLabel.NEGATIVE if num_pixels == 0 else SliceLabel.EXCLUDED
