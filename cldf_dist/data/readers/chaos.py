"""CHAOS, abdominal CT and MR: DICOM series with one PNG mask per slice.

Layout below `data.root` or its folder Train_Sets (where there is none: Test_Sets):
MR/<id>/T1DUAL/DICOM_anon/{InPhase,OutPhase}/*.dcm, MR/<id>/T2SPIR/DICOM_anon/*.dcm,
CT/<id>/DICOM_anon/*.dcm, and beside DICOM_anon the masks in Ground/*.png, or none. A run reads one
modality, `data.modality`. The ids of MR and CT are different people: they are called MR_1 and CT_1.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cldf_dist.config import Data
from cldf_dist.data.formats.chaos_masks import GRAY_VALUES, mask_files, read_masks
from cldf_dist.data.formats.dicom import Series, dicom_files, group_series, read_series
from cldf_dist.data.formats.listing import natural_order, subfolders
from cldf_dist.data.formats.nifti import Volume
from cldf_dist.data.readers.chaos_phases import PHASE_FOLDERS, phases
from cldf_dist.data.readers.objects import USUAL_OBJECTS, object_names
from cldf_dist.data.readers.volumes import volume_of_scans

CHANNELS = {"mr_t1": ("in_phase", "out_phase"), "mr_t2": ("t2_spir",), "ct": ("ct",)}
SEQUENCES = {"mr_t1": ("MR", "T1DUAL"), "mr_t2": ("MR", "T2SPIR"), "ct": ("CT", "")}
SETS = ("", "Train_Sets", "Test_Sets")


@dataclass(frozen=True)
class _Scan:
    """The files of a patient in one modality."""

    modality: str  # as in data.modality
    patient: str
    folder: Path  # holds DICOM_anon and Ground
    place: str  # of this folder in the data set's layout, such as MR/1/T1DUAL
    images: dict[Path, list[Path]]  # folder of a series -> its DICOM files
    masks: list[Path]

    @property
    def scanner(self) -> str:
        return SEQUENCES[self.modality][0]


def channels(settings: Data) -> tuple[str, ...]:
    """Names of the image channels, in their order."""
    return CHANNELS[_modality(settings)]


def objects(settings: Data) -> tuple[str, ...]:
    """Names of the objects that `data.object` may be, in the chosen modality."""
    return tuple(GRAY_VALUES[SEQUENCES[_modality(settings)][0]])


def patients(settings: Data) -> list[str]:
    """Names of the patients of the modality, `MR_<id>` or `CT_<id>`, numbers in numerical order.

    Raises FileNotFoundError where `data.root` holds no such folder, ValueError where it is empty.
    """
    folder = _scanner_folder(settings)
    found = subfolders(folder)
    if not found:
        raise ValueError(f"{folder} is empty; expected a folder per patient: {_layout(settings)}")
    return [f"{folder.name}_{item.name}" for item in sorted(found, key=natural_order)]


def patient_files(settings: Data, patient: str) -> list[Path]:
    """The files of a patient that are read: DICOM files, then masks."""
    scan = _scan(settings, patient)
    return [*(file for files in scan.images.values() for file in files), *scan.masks]


def listing_faults(settings: Data, patient: str) -> list[str]:
    """The faults of a patient's folders, a sentence each; no file is opened."""
    return _faults(_scan(settings, patient))


def read_patient(settings: Data, patient: str) -> Volume:
    """One patient in the chosen modality; `mask` is None where Ground is missing or empty.

    Raises ValueError, with the file or folder, for files that do not make one scan, or masks that
    do not fit it.
    """
    object_names(settings.object, objects(settings), usual=USUAL_OBJECTS["chaos"])
    return _read(_scan(settings, patient), settings)


def new_scans(settings: Data, folder: str | Path) -> list[tuple[str, Callable[[], Volume]]]:
    """Name and reader of each scan of the chosen modality at `folder`; masks are left alone.

    `folder` is that of the data set, of a patient, of a patient's sequence, or, for T1, any that
    holds both echoes, itself or in InPhase and OutPhase. None where it is nothing of the kind.
    """
    folder, modality = Path(folder), _modality(settings)
    scanner, sequence = SEQUENCES[modality]
    tops = [folder / sequence / "DICOM_anon", folder / "DICOM_anon"]
    if any((folder / name / scanner).is_dir() for name in SETS):
        here = dataclasses.replace(settings, root=str(folder))
        found = [_scan(here, patient) for patient in patients(here)]
    elif any(top.is_dir() for top in tops):
        found = [_scan_in(next(top for top in tops if top.is_dir()), modality)]
    elif modality == "mr_t1" and any(_images(folder, modality).values()):
        found = [_scan_in(folder, modality)]
    else:
        found = []
    scans = [dataclasses.replace(scan, masks=[]) for scan in found]
    return [(scan.patient, partial(_read, scan, settings)) for scan in scans]


def _read(scan: _Scan, settings: Data) -> Volume:
    faults = _faults(scan)
    if faults:
        raise ValueError("; ".join(faults))
    series = _channel_series(scan)
    volume = volume_of_scans(
        scan.patient,
        [(one.image, one.affine) for one in series],
        [one.folder for one in series],
        settings,
        hounsfield=scan.scanner == "CT",
    )
    masks = _masks_by_slice(scan, series)
    mask = None
    if scan.masks:
        size = (volume.image.shape[1], volume.image.shape[2])
        mask = read_masks(masks, scanner=scan.scanner, object_name=settings.object, shape=size)
    return dataclasses.replace(
        volume,
        mask=mask,
        mask_names=tuple(f"{scan.place}/Ground/{file.name}" for file in masks),
        dicom_files=series[0].files,
    )


def _modality(settings: Data) -> str:
    if settings.modality not in CHANNELS:
        known = ", ".join(CHANNELS)
        raise ValueError(f"data.modality must be one of {known}, got {settings.modality!r}")
    return settings.modality


def _layout(settings: Data) -> str:
    scanner, sequence = SEQUENCES[_modality(settings)]
    series = "/{InPhase,OutPhase}" if settings.modality == "mr_t1" else ""
    return "/".join(filter(None, (scanner, "<id>", sequence, f"DICOM_anon{series}/*.dcm")))


def _scanner_folder(settings: Data) -> Path:
    scanner, _ = SEQUENCES[_modality(settings)]
    root = Path(settings.root)
    for name in SETS:
        if (root / name / scanner).is_dir():
            return root / name / scanner
    raise FileNotFoundError(
        f"data.root={root} has no folder {scanner}, nor has its Train_Sets or Test_Sets; expected "
        f"{_layout(settings)} for data.modality={settings.modality}"
    )


def _scan(settings: Data, patient: str) -> _Scan:
    scanners = _scanner_folder(settings)
    person = scanners / patient.removeprefix(f"{scanners.name}_")
    if person.name == patient or person.parent != scanners or not person.is_dir():
        raise FileNotFoundError(
            f"there is no patient {patient!r} in {scanners}; names are {scanners.name}_<id>"
        )
    return _scan_in(person / SEQUENCES[settings.modality][1] / "DICOM_anon", settings.modality)


def _scan_in(top: Path, modality: str) -> _Scan:
    """The scan whose images are in the folder `top`, or for T1 in two folders of it."""
    scanner, sequence = SEQUENCES[modality]
    folder = top.parent if top.name == "DICOM_anon" else top
    person = folder.parent if sequence and folder.name == sequence else folder
    own = person.parent.name == scanner
    return _Scan(
        modality=modality,
        patient=f"{scanner}_{person.name}" if own else person.name,
        folder=folder,
        place="/".join(filter(None, (scanner, person.name, sequence))),
        images=_images(top, modality),
        masks=mask_files(folder / "Ground"),
    )


def _images(top: Path, modality: str) -> dict[Path, list[Path]]:
    """The DICOM files by their folders: `top` itself, or those of the echoes."""
    files = _dicom_files(top)
    if files or modality != "mr_t1":
        return {top: files}
    return {top / name: _dicom_files(top / name) for name in PHASE_FOLDERS}


def _dicom_files(folder: Path) -> list[Path]:
    return dicom_files(folder) if folder.is_dir() else []


def _faults(scan: _Scan) -> list[str]:
    """The first fault of the listing, for later ones may follow from it."""
    counts = {folder.relative_to(scan.folder): len(files) for folder, files in scan.images.items()}
    empty = [str(folder) for folder, count in counts.items() if not count]
    num_masks = f"{len(scan.masks)} {'mask' if len(scan.masks) == 1 else 'masks'}"
    if len(empty) == len(counts):
        held = f"holds {num_masks} but no images" if scan.masks else "is empty"
        return [f"{scan.folder} {held}; expected DICOM files in {' and '.join(empty)}"]
    if empty:
        return [
            f"{scan.folder / empty[0]} has no DICOM files, {scan.modality} needs both echoes; "
            "fetch it, or take data.modality=mr_t2"
        ]
    found = " and ".join(f"{count} in {folder}" for folder, count in counts.items())
    if len(set(counts.values())) > 1:
        return [f"{scan.folder}: both echoes must have the same slices, found {found}; fetch all"]
    num_images = sum(counts.values())
    if scan.masks and len(scan.masks) * len(CHANNELS[scan.modality]) != num_images:
        return [
            f"{scan.folder / 'Ground'} must hold a mask per slice, got {num_masks} for the DICOM "
            f"files, {found}; fetch all, or remove Ground"
        ]
    return []


def _channel_series(scan: _Scan) -> tuple[Series, ...]:
    """The series in the order of the channels."""
    if scan.modality == "mr_t1":
        found = [
            read_series(files, name=str(folder))
            for folder, all_files in scan.images.items()
            for files in group_series(all_files).values()
        ]
        series: tuple[Series, ...] = phases(found)
    else:
        series = tuple(read_series(files, name=str(top)) for top, files in scan.images.items())
    for one in series:
        if one.modality not in ("", scan.scanner):
            raise ValueError(
                f"{one.folder}: data.modality={scan.modality} needs DICOM files of Modality "
                f"{scan.scanner}, got {one.modality}; fetch the right series"
            )
    return series


def _masks_by_slice(scan: _Scan, series: Sequence[Series]) -> list[Path]:
    """The mask of every slice, in the order of the slices; where there is none, the file that
    CHAOS would have: MR masks bear the names of the in-phase files, CT masks are counted."""
    ground, files = scan.folder / "Ground", series[0].files
    by_name = sorted(files, key=natural_order)
    if scan.masks:
        named = _masks_by_stem(scan.masks, series) if scan.scanner == "MR" else None
        in_order = dict(zip(by_name, scan.masks, strict=True))
        return named or [in_order[file] for file in files]
    if scan.scanner == "MR":
        return [ground / f"{file.stem}.png" for file in files]
    return [ground / f"liver_GT_{by_name.index(file):03d}.png" for file in files]


def _masks_by_stem(masks: Collection[Path], series: Sequence[Series]) -> list[Path] | None:
    """The masks in the order of the slices, by the names of one of the series' files.

    None where no mask bears such a name; ValueError where only some do.
    """
    by_stem = {mask.stem: mask for mask in masks}
    for one in series:
        stems = [file.stem for file in one.files]
        if set(stems) == set(by_stem):
            return [by_stem[stem] for stem in stems]
    known = {file.stem for one in series for file in one.files}
    strange = [mask for mask in masks if mask.stem not in known]
    if len(strange) == len(masks):
        return None
    raise ValueError(
        f"{(strange or list(masks))[0]} must be named like a DICOM file of the same series as the "
        "folder's other masks; rename it, or fetch the folder again"
    )
