"""NIfTI files: a volume in, a mask or map out."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from cldf_dist.system.files import atomic_write

Affine = npt.NDArray[np.float64]

NIFTI2_HEADER_BYTES = 540
NIFTI1_MAGIC_AT, NIFTI1_MAGIC = 344, (b"n+1", b"ni1")
GZIP_MAGIC = b"\x1f\x8b"
NO_EXTENSIONS = b"\0\0\0\0"  # behind the header of a .nii file
AFFINE_TOLERANCE = 1e-3  # mm
SCANNER_COORDINATES = 1  # the sform and qform code of what we write
_UNREADABLE = (
    *(OSError, EOFError, ValueError, zlib.error),
    *(ImageFileError, HeaderDataError, WrapStructError),
)


@dataclass(frozen=True)
class Volume:
    """One scan in the orientation of its file."""

    patient: str
    image: npt.NDArray[Any]  # (channels, x, y, slices), float32 or int16
    body_mask: npt.NDArray[np.bool_]  # (x, y, slices): where the body is
    mask: npt.NDArray[np.bool_] | None  # (x, y, slices): the object; None where nobody drew it
    affine: Affine  # (4, 4), voxel index to mm
    sources: tuple[str, ...] = ()  # per channel the file or folder it was read from, for messages
    hounsfield: bool = False  # the values are Hounsfield units
    # per slice of the axis to the head, in the file's order: 1 object, 0 none, -2 unknown; they
    # count in place of the mask's
    slice_labels: npt.NDArray[np.int8] | None = None
    mask_names: tuple[str, ...] = ()  # per slice: its mask's file in the data set's own layout
    dicom_files: tuple[Path, ...] = ()  # per slice, of the first channel, where it came as DICOM

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the axes of the file."""
        return voxel_size(self.affine)


def voxel_size(affine: Affine) -> tuple[float, float, float]:
    """Voxel size in mm along each array axis."""
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).tolist()
    return (x, y, z)


def read_nifti(path: str | Path) -> tuple[npt.NDArray[Any], Affine]:
    """The voxels (x, y, slices) as stored, scaled where the file says so, and the (4, 4) affine.

    64-bit integers come back as int32, 64-bit floats as float32. The file's own checksum is
    verified. Raises FileNotFoundError, or ValueError with the file's name where it is damaged, not
    three-dimensional or holds numbers that are not finite.
    """
    path = Path(path)
    content = _content(path)
    try:
        with LoggingOutputSuppressor():  # nibabel prints what it thinks of a damaged header
            header_bytes = {int.from_bytes(content[:4], order) for order in ("little", "big")}
            kind = nib.Nifti2Image if NIFTI2_HEADER_BYTES in header_bytes else nib.Nifti1Image
            image: Any = kind.from_bytes(content)
        stored = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        raise ValueError(f"{path} is truncated or damaged: {error}; fetch it again") from error
    affine = check_affine(np.asarray(image.affine, np.float64), path)
    return _plain_numbers(_three_dimensional(stored, path), path), affine


def write_nifti(path: str | Path, array: npt.NDArray[Any], affine: Affine) -> None:
    """Write (x, y, slices) as `.nii.gz`; bool and uint8 become uint8, all else float32.

    The same input gives the same bytes. The file appears whole or not at all. Beside the array
    itself no more than a slice of it is in memory.
    """
    path = Path(path)
    if not path.name.endswith(".nii.gz"):
        raise ValueError(f"the file name must end in .nii.gz, got {path}")
    if array.ndim != 3:
        raise ValueError(f"{path}: the array must be (x, y, slices), got shape {array.shape}")
    header = _header(array, affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(path) as file,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,
    ):
        packed.write(header.binaryblock + NO_EXTENSIONS)
        for index in range(array.shape[2]):  # only a slice at a time is held in the file's form
            packed.write(array[:, :, index].astype(header.get_data_dtype()).tobytes(order="F"))


def check_affine(affine: Affine, path: str | Path) -> Affine:
    """The affine itself; ValueError unless it is (4, 4) and places a grid in space."""
    grid = affine.shape == (4, 4) and np.isfinite(affine).all()
    if not grid or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(
            f"{path}: the affine does not describe a grid in space: {affine.tolist()}; repair the "
            "file's header"
        )
    return affine


def check_same_grid(
    path: Path,
    scan: tuple[npt.NDArray[Any], Affine],
    other_path: Path,
    other: tuple[npt.NDArray[Any], Affine],
) -> None:
    """Raise ValueError, with both files, unless shape and affine agree."""
    if scan[0].shape != other[0].shape:
        raise ValueError(
            f"{path} and {other_path} must have the same shape, "
            f"got {scan[0].shape} and {other[0].shape}; resample them to one grid"
        )
    if not np.allclose(scan[1], other[1], rtol=0, atol=AFFINE_TOLERANCE):
        raise ValueError(
            f"{path} and {other_path} must have the same affine, "
            f"got {scan[1].tolist()} and {other[1].tolist()}; register them to one grid"
        )


def stack_channels(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """(channels, x, y, slices), int16 where that loses nothing, else float32."""
    fits = all(np.can_cast(array.dtype, np.int16) for array in arrays)
    return np.stack([array.astype(np.int16 if fits else np.float32) for array in arrays])


def _header(array: npt.NDArray[Any], affine: Affine) -> Any:
    """The bytes that `write_nifti` puts before the voxels; raises nibabel's error for a wrong
    affine."""
    whole_numbers = array.dtype == np.bool_ or array.dtype == np.uint8
    kind = np.uint8 if whole_numbers else np.float32
    image = nib.Nifti1Image(np.broadcast_to(kind(0), array.shape), affine)  # no memory for voxels
    image.set_sform(affine, code=SCANNER_COORDINATES)
    image.set_qform(affine, code=SCANNER_COORDINATES)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1, 0)
    image.header["vox_offset"] = len(image.header.binaryblock) + len(NO_EXTENSIONS)
    return image.header


def _content(path: Path) -> bytes:
    """The whole file, unpacked: nibabel alone stops before it reaches gzip's checksum."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}; make it a readable file") from None
    packed = content.startswith(GZIP_MAGIC)
    if packed and path.name.endswith(".nii"):
        raise ValueError(f"{path} is packed by gzip; add .gz to its name, or unpack it")
    if not path.name.endswith(".gz"):
        return content
    if not packed and content[NIFTI1_MAGIC_AT : NIFTI1_MAGIC_AT + 3] in NIFTI1_MAGIC:
        raise ValueError(f"{path} is not packed; take .gz off its name, or pack it by gzip")
    try:
        return gzip.decompress(content)
    except _UNREADABLE as error:
        raise ValueError(f"{path} is truncated or damaged: {error}; fetch it again") from error


def _three_dimensional(array: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"{path} must be three-dimensional, got shape {array.shape}; save one volume a file"
        )
    return array


def _plain_numbers(array: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """Native byte order, at most 32-bit integers or float32, finite."""
    if array.dtype.kind in "iu":
        wide = array.dtype.itemsize > 4 or array.dtype == np.uint32
        if not wide:
            return np.asarray(array, array.dtype.newbyteorder("="))
        limits = np.iinfo(np.int32)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(f"{path}: {array.dtype} values must fit 32 bits; rescale the file")
        return array.astype(np.int32)
    if array.dtype.kind != "f":
        raise ValueError(
            f"{path}: voxels must be real numbers, got {array.dtype}; convert the file"
        )
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        count = int((~np.isfinite(numbers)).sum())
        raise ValueError(f"{path}: {count} voxels are not finite numbers; repair the file")
    return numbers
