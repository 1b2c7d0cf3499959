"""BraTS folders, named as in 2021 and before or as in 2023 and after.

Layout: `<root>/<patient>/<patient>_{flair,t1,t1ce,t2,seg}.nii.gz`, or
`<root>/<patient>/<patient>-{t2f,t1n,t1c,t2w,seg}.nii.gz`; unpacked `.nii` files are read as well.
The object is the whole tumour: every label above 0.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_dist.data.nifti import Affine, Volume, read_nifti

CHANNELS = ("flair", "t1", "t1ce", "t2")
LABELS = (0, 1, 2, 3, 4)  # 4 enhancing until 2021, 3 enhancing since 2023
ENDINGS = {  # of the file name, before .nii or .nii.gz
    "flair": ("_flair", "-t2f"),
    "t1": ("_t1", "-t1n"),
    "t1ce": ("_t1ce", "-t1c"),
    "t2": ("_t2", "-t2w"),
    "seg": ("_seg", "-seg"),
}
LAYOUT = "<root>/<patient>/<patient>_{flair,t1,t1ce,t2,seg}.nii.gz or -{t2f,t1n,t1c,t2w,seg}.nii.gz"
AFFINE_TOLERANCE = 1e-3  # mm
LABEL_TOLERANCE = 0.01  # a label saved as a scaled float comes back as 4.00000024


def brats_patients(root: str | Path) -> list[str]:
    """Sorted names of the folders under `root` that hold at least one scan.

    Raises FileNotFoundError where `root` is no folder, ValueError where no folder holds a scan.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root is not a folder: {root}; expected {LAYOUT}")
    found = [folder.name for folder in sorted(root.iterdir()) if is_patient_folder(folder)]
    if not found:
        raise ValueError(f"{root} holds no BraTS scans; expected {LAYOUT}")
    return found


def is_patient_folder(folder: Path) -> bool:
    """True where `folder` holds at least one scan."""
    return folder.is_dir() and any(_files(folder, channel) for channel in CHANNELS)


def patient_files(folder: Path) -> list[Path]:
    """The files of a patient that are read: the scans and the segmentation, sorted by kind."""
    return [file for kind in ENDINGS for file in _files(folder, kind)]


def listing_faults(folder: Path) -> list[str]:
    """What is wrong with a patient's file names, a sentence each; no file is opened."""
    faults = []
    for kind in ENDINGS:
        if kind == "seg" and not _files(folder, kind):
            continue
        try:
            _only_file(folder, kind)
        except (FileNotFoundError, ValueError) as error:
            faults.append(str(error))
    return faults


def read_brats(root: str | Path, patient: str, with_mask: bool = True) -> Volume:
    """One patient of a BraTS folder; channels in the order of CHANNELS."""
    return read_scan(Path(root) / patient, with_mask=with_mask)


def read_scan(path: str | Path, *, with_mask: bool = True) -> Volume:
    """One patient folder anywhere; `mask` is None where it has no segmentation.

    `with_mask=False` does not open the segmentation. Raises FileNotFoundError for a missing
    modality, ValueError for files that disagree in shape or affine and for unknown labels.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected {LAYOUT}")
    paths = {channel: _only_file(folder, channel) for channel in CHANNELS}
    scans = {channel: read_nifti(file) for channel, file in paths.items()}
    reference = CHANNELS[0]
    for channel in CHANNELS[1:]:
        _check_same_grid(paths[reference], scans[reference], paths[channel], scans[channel])
    image = _stack([scans[channel][0] for channel in CHANNELS])
    mask = None
    if with_mask and _files(folder, "seg"):
        mask_path = _only_file(folder, "seg")
        labels = read_nifti(mask_path)
        _check_same_grid(paths[reference], scans[reference], mask_path, labels)
        mask = _object_mask(labels[0], mask_path)
    return Volume(folder.name, image, (image != 0).any(axis=0), mask, scans[reference][1])


def _files(folder: Path, kind: str) -> list[Path]:
    """Files of one modality; hidden ones (as some systems leave behind) do not count."""
    endings = tuple(ending + suffix for ending in ENDINGS[kind] for suffix in (".nii.gz", ".nii"))
    return sorted(
        file
        for file in folder.iterdir()
        if file.name.endswith(endings) and not file.name.startswith(".")
    )


def _only_file(folder: Path, kind: str) -> Path:
    files = _files(folder, kind)
    if not files:
        names = " or ".join(f"*{ending}.nii.gz" for ending in ENDINGS[kind])
        raise FileNotFoundError(f"{folder} has no {kind} scan; expected {names}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} has more than one {kind} file: {names}; keep one")
    return files[0]


def _check_same_grid(
    path: Path,
    scan: tuple[npt.NDArray[Any], Affine],
    other_path: Path,
    other: tuple[npt.NDArray[Any], Affine],
) -> None:
    if scan[0].shape != other[0].shape:
        raise ValueError(
            f"{path} and {other_path} must have the same shape, "
            f"got {scan[0].shape} and {other[0].shape}"
        )
    if not np.allclose(scan[1], other[1], rtol=0, atol=AFFINE_TOLERANCE):
        raise ValueError(
            f"{path} and {other_path} must have the same affine, "
            f"got {scan[1].tolist()} and {other[1].tolist()}; register them to one grid"
        )


def _stack(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """(channels, x, y, slices), int16 where that loses nothing, else float32."""
    fits = all(np.can_cast(array.dtype, np.int16) for array in arrays)
    return np.stack([array.astype(np.int16 if fits else np.float32) for array in arrays])


def _object_mask(labels: npt.NDArray[Any], path: Path) -> npt.NDArray[np.bool_]:
    rounded = np.rint(labels)
    wrong = ~np.isin(rounded, LABELS) | (np.abs(labels - rounded) > LABEL_TOLERANCE)
    if wrong.any():
        values = np.unique(labels[wrong])[:5].tolist()
        raise ValueError(f"{path}: labels must be one of {LABELS}, found {values}")
    return np.asarray(rounded > 0)
