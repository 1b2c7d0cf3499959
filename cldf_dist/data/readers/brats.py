"""BraTS folders, named as in 2021 and before or as in 2023 and after.

Layout: `<root>/<patient>/<patient>_{flair,t1,t1ce,t2,seg}.nii.gz`, or
`<root>/<patient>/<patient>-{t2f,t1n,t1c,t2w,seg}.nii.gz`; unpacked `.nii` files are read as well.
The usual object is the whole tumour: every label above 0.
"""

import contextlib
import dataclasses
from pathlib import Path

from cldf_dist.config import Data
from cldf_dist.data.formats.listing import NIFTI_ENDINGS, is_visible, nifti_files, subfolders
from cldf_dist.data.formats.nifti import Volume, check_same_grid, read_nifti
from cldf_dist.data.readers.objects import USUAL_OBJECTS, label_values, mask_of_labels
from cldf_dist.data.readers.volumes import volume_of_scans

CHANNELS = ("flair", "t1", "t1ce", "t2")
WHOLE_TUMOUR = USUAL_OBJECTS["brats"]
UNTIL_2021 = {WHOLE_TUMOUR: (1, 2, 4), "tumour_core": (1, 4), "enhancing_tumour": (4,)}
SINCE_2023 = {WHOLE_TUMOUR: (1, 2, 3), "tumour_core": (1, 3), "enhancing_tumour": (3,)}
ENDINGS = {  # of the file name, before .nii or .nii.gz
    "flair": ("_flair", "-t2f"),
    "t1": ("_t1", "-t1n"),
    "t1ce": ("_t1ce", "-t1c"),
    "t2": ("_t2", "-t2w"),
    "seg": ("_seg", "-seg"),
}
LAYOUT = "<root>/<patient>/<patient>_{flair,t1,t1ce,t2,seg}.nii.gz or -{t2f,t1n,t1c,t2w,seg}.nii.gz"


def channels(settings: Data) -> tuple[str, ...]:
    """Names of the image channels, in their order."""
    return CHANNELS


def objects(settings: Data) -> tuple[str, ...]:
    """Names of the objects that `data.object` may be."""
    return tuple(UNTIL_2021)


def patients(settings: Data) -> list[str]:
    """Sorted names of the patients' folders."""
    return brats_patients(settings.root)


def patient_files(settings: Data, patient: str) -> list[Path]:
    """The files of a patient that are read: the scans and the segmentation, sorted by kind."""
    folder = Path(settings.root) / patient
    return [file for kind in ENDINGS for file in _files(folder, kind)]


def listing_faults(settings: Data, patient: str) -> list[str]:
    """The faults of a patient's file names, a sentence each; no file is opened."""
    folder, faults = Path(settings.root) / patient, []
    for kind in ENDINGS:
        if kind == "seg" and not _files(folder, kind):
            continue
        try:
            _only_file(folder, kind)
        except (FileNotFoundError, ValueError) as error:
            faults.append(str(error))
    return faults


def read_patient(settings: Data, patient: str) -> Volume:
    """One patient; channels in the order of CHANNELS."""
    return read_scan(Path(settings.root) / patient, settings)


def brats_patients(root: str | Path) -> list[str]:
    """Sorted names of the folders under `root` that hold at least one scan.

    Raises FileNotFoundError where `root` is no folder, ValueError where no folder holds a scan.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.root is not a folder: {root}; expected {LAYOUT}; set it to the folder <root>"
        )
    found = [folder.name for folder in subfolders(root) if is_patient_folder(folder)]
    if not found:
        raise ValueError(
            f"data.root={root} holds no BraTS scans; expected {LAYOUT}; {_where_else(root)}"
        )
    return found


def is_patient_folder(folder: Path) -> bool:
    """True where `folder` holds at least one scan."""
    return folder.is_dir() and any(_files(folder, channel) for channel in CHANNELS)


def read_scan(path: str | Path, settings: Data, *, with_mask: bool = True) -> Volume:
    """One patient folder anywhere; `mask` is None where it has no segmentation.

    `with_mask=False` does not open the segmentation. Raises
    FileNotFoundError for a missing modality, ValueError for files that disagree in shape or affine
    and for unknown labels.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected {LAYOUT}")
    paths = [_only_file(folder, channel) for channel in CHANNELS]
    scans = [read_nifti(file) for file in paths]
    volume = volume_of_scans(folder.name, scans, paths, settings)
    if not (with_mask and _files(folder, "seg")):
        return volume
    mask_path = _only_file(folder, "seg")
    labels = read_nifti(mask_path)
    check_same_grid(paths[0], scans[0], mask_path, labels)
    table = SINCE_2023 if "-seg" in mask_path.name else UNTIL_2021
    wanted = label_values(settings.object, table, usual=WHOLE_TUMOUR)
    allowed = (0, *table[WHOLE_TUMOUR])
    mask = mask_of_labels(labels[0], mask_path, wanted=wanted, allowed=allowed)
    return dataclasses.replace(volume, mask=mask)


def _where_else(root: Path) -> str:
    """A remedy for a folder without patients."""
    if is_patient_folder(root):
        return f"it is one patient's folder, set data.root={root.parent}"
    entries = sorted(filter(is_visible, root.iterdir()))
    for folder in entries:
        with contextlib.suppress(OSError):  # folders that are not ours to read
            if folder.is_dir() and any(is_patient_folder(inner) for inner in folder.iterdir()):
                return f"the patients are one folder deeper, set data.root={folder}"
    names = ", ".join(entry.name for entry in entries[:3])
    return f"it holds {len(entries)} other entries: {names}, ..." if entries else "it is empty"


def _files(folder: Path, kind: str) -> list[Path]:
    """Files of one modality."""
    endings = tuple(ending + suffix for ending in ENDINGS[kind] for suffix in NIFTI_ENDINGS)
    return [file for file in nifti_files(folder) if file.name.endswith(endings)]


def _only_file(folder: Path, kind: str) -> Path:
    files = _files(folder, kind)
    if not files:
        names = " or ".join(f"*{ending}.nii.gz" for ending in ENDINGS[kind])
        raise FileNotFoundError(
            f"{folder} has no {kind} scan; expected {names}: add it or leave the patient out"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} has more than one {kind} file: {names}; keep one")
    if not files[0].is_file():
        raise FileNotFoundError(
            f"{files[0]} is not a file but a folder or a broken link; put the scan there"
        )
    return files[0]
