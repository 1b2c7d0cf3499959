"""Scans that come without labels: found in a file or folder, read as the training data were."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cldf_dist.config import Data
from cldf_dist.data.formats import dicom
from cldf_dist.data.formats.listing import NIFTI_ENDINGS, nifti_files, subfolders
from cldf_dist.data.formats.nifti import Volume, read_nifti
from cldf_dist.data.readers import brats
from cldf_dist.data.readers.volumes import volume_of_scans

# what lies beside scans but is none: masks as several tools name them, and what we write
NO_SCANS = ("mask", "seg", "probability", "labels")
NO_SCAN_FOLDERS = ("labelsTr", "labelsTs")
BRATS_CHANNELS = ("brats", "phantom")  # the data sets whose channels are the four of BraTS


@dataclass(frozen=True)
class ScanKind:
    """The kind of scans that a run was trained on."""

    settings: Data
    channels: tuple[str, ...]  # what a scan must have, in this order
    hounsfield: bool  # the values are Hounsfield units


@dataclass(frozen=True)
class Scan:
    """A scan that was found, and how to read it: a Volume without a mask."""

    name: str
    read: Callable[[], Volume]
    folder: Path  # where it lies
    named_by_folder: bool = False  # its files say nothing about whose it is


def find_scans(path: str | Path, kind: ScanKind, *, leave_out: Path | None = None) -> list[Scan]:
    """The scans at `path`: a file, a scan's folder, or a folder of scans.

    Understood are the layout of the training data, DICOM (the files of one series, or one folder
    per channel) and NIfTI files named as in nnU-Net (`<case>_0000.nii.gz`, one per channel; any
    name where there is one channel). Files called like masks, and what lies in `leave_out`, are
    not looked at. A scan that lacks a channel is found, and raises when it is read.
    """
    path = Path(path).absolute()
    if path.is_file():
        return [_scan_of_file(path, kind)]
    if not path.is_dir():
        raise FileNotFoundError(f"input={path} does not exist")
    scans = list(_scans_below(path, kind, leave_out))
    if not scans:
        raise ValueError(
            f"input={path} holds no scan; expected {_expected(kind)}, or a folder of such"
        )
    return _with_names_of_their_own(scans, path)


def _scan_of_file(path: Path, kind: ScanKind) -> Scan:
    if path.name.endswith(NIFTI_ENDINGS):
        if kind.settings.dataset in BRATS_CHANNELS and brats.is_patient_folder(path.parent):
            return _brats_scan(path.parent, kind)
        for scan, files in _nifti_cases([path, *_nifti_files(path.parent)], kind):
            if path in files:
                return scan
        raise ValueError(
            f"input={path}: the run's scans have {len(kind.channels)} channels "
            f"({', '.join(kind.channels)}); expected {_expected(kind)}"
        )
    files = dicom.dicom_files(path.parent)
    if path in files and len(kind.channels) == 1:
        series = next(group for group in dicom.group_series(files).values() if path in group)
        return _dicom_scan(path.parent, [series], kind)
    if path in files:
        raise ValueError(f"input={path} is one of several files; name the folder of the scan")
    raise ValueError(f"input={path} is neither a NIfTI file (.nii, .nii.gz) nor a DICOM file")


def _scans_below(folder: Path, kind: ScanKind, leave_out: Path | None) -> Iterator[Scan]:
    """The scans of the folder, or of those in it where it is none itself, at any depth."""
    found = list(_scans_in(folder, kind))
    yield from found
    for below in () if found else subfolders(folder):
        if below.name not in NO_SCAN_FOLDERS and below != leave_out:
            yield from _scans_below(below, kind, leave_out)


def _scans_in(folder: Path, kind: ScanKind) -> list[Scan]:
    """The scans that lie in the folder itself, or are it."""
    if kind.settings.dataset in BRATS_CHANNELS and brats.is_patient_folder(folder):
        return [_brats_scan(folder, kind)]
    if kind.settings.dataset == "chaos":
        from cldf_dist.data.readers import chaos

        person = folder.parent if folder.name == "DICOM_anon" else folder
        found = chaos.new_scans(kind.settings, person)
        if found:
            return [Scan(name, read, folder) for name, read in found]
    channels = [folder / name for name in kind.channels]
    if len(channels) > 1 and all(channel.is_dir() for channel in channels):
        series = [next(dicom.dicom_folders(channel), []) for channel in channels]
        if all(series):
            return [_dicom_scan(folder, series, kind)]
    files = dicom.dicom_files(folder)
    if files and len(channels) == 1:
        return [_dicom_scan(folder, [files], kind)]
    return [scan for scan, _ in _nifti_cases(_nifti_files(folder), kind)]


def _with_names_of_their_own(scans: Sequence[Scan], top: Path) -> list[Scan]:
    """Scans that their files do not name take the topmost folder below `top` that is theirs alone;
    files of the same name in several folders take the folders' names before their own."""
    named = [
        dataclasses.replace(scan, name=_folder_name(scan, scans, top))
        if scan.named_by_folder
        else scan
        for scan in scans
    ]
    names = [scan.name for scan in named]
    return [
        scan
        if names.count(scan.name) == 1
        else dataclasses.replace(scan, name="_".join((*_parts_below(scan, top), scan.name)))
        for scan in named
    ]


def _folder_name(scan: Scan, scans: Sequence[Scan], top: Path) -> str:
    if scan.folder == top:
        return top.name
    chain = [scan.folder, *scan.folder.parents]
    below = reversed(chain[: chain.index(top)])
    own = next(
        folder
        for folder in below
        if sum(other.folder.is_relative_to(folder) for other in scans) == 1
    )
    # of a single scan nobody knows whether `top` is the patient's folder or that of the patients
    return own.name if len(scans) > 1 else f"{top.name}_{own.name}"


def _parts_below(scan: Scan, top: Path) -> tuple[str, ...]:
    parts = scan.folder.relative_to(top).parts
    return parts[:-1] if scan.named_by_folder else parts


def _brats_scan(folder: Path, kind: ScanKind) -> Scan:
    read = partial(brats.read_scan, folder, kind.settings, with_mask=False)
    return Scan(folder.name, read, folder)


def _nifti_files(folder: Path) -> list[Path]:
    """The files that may be scans, by their names."""
    return [
        file
        for file in nifti_files(folder)
        if _stem(file).lower().replace("-", "_").split("_")[-1] not in NO_SCANS and file.is_file()
    ]


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")


def _nifti_cases(files: Sequence[Path], kind: ScanKind) -> list[tuple[Scan, list[Path]]]:
    """Per case the scan and its files; numbers in the names are those of the channels."""
    by_case: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in files:
        case, _, number = _stem(file).rpartition("_")
        if case and len(number) == 4 and number.isdecimal():
            by_case[case][int(number)] = file
        elif len(kind.channels) == 1:
            by_case[_stem(file)][0] = file
    found = []
    for case, parts in by_case.items():
        if len(kind.channels) == 1 and set(parts) != {0}:  # the numbers are those of scans
            found += [(_nifti_scan(_stem(file), [file], kind), [file]) for file in parts.values()]
        else:
            found.append((_nifti_scan(case, parts, kind), list(parts.values())))
    return found


def _nifti_scan(case: str, parts: dict[int, Path] | list[Path], kind: ScanKind) -> Scan:
    numbered = parts if isinstance(parts, dict) else dict(enumerate(parts))
    folder = next(iter(numbered.values())).parent
    return Scan(case, partial(_read_nifti, case, numbered, kind), folder)


def _read_nifti(case: str, parts: dict[int, Path], kind: ScanKind) -> Volume:
    names = ", ".join(kind.channels)
    wanted = range(len(kind.channels))
    folder = next(iter(parts.values())).parent
    for number in wanted:
        if number not in parts:
            raise FileNotFoundError(
                f"{folder} has no {case}_{number:04d}.nii.gz, the channel {kind.channels[number]}; "
                f"the run needs {names}"
            )
    surplus = [file for number, file in parts.items() if number not in wanted]
    if surplus:
        raise ValueError(
            f"{surplus[0]} is one channel too many; the run has {len(wanted)}: {names}"
        )
    files = [parts[number] for number in wanted]
    scans = [read_nifti(file) for file in files]
    return volume_of_scans(case, scans, files, kind.settings, hounsfield=kind.hounsfield)


def _dicom_scan(folder: Path, series: Sequence[Sequence[Path]], kind: ScanKind) -> Scan:
    read = partial(_read_dicom, folder.name, series, kind)
    return Scan(folder.name, read, folder, named_by_folder=True)


def _read_dicom(name: str, groups: Sequence[Sequence[Path]], kind: ScanKind) -> Volume:
    places = [str(files[0].parent) for files in groups]
    series = [dicom.read_series(files, name=place) for files, place in zip(groups, places)]
    scans = [(item.image, item.affine) for item in series]
    volume = volume_of_scans(name, scans, places, kind.settings, hounsfield=kind.hounsfield)
    return dataclasses.replace(volume, dicom_files=series[0].files)


def _expected(kind: ScanKind) -> str:
    if kind.settings.dataset in BRATS_CHANNELS:
        own = brats.LAYOUT.replace("<root>/", "")
    elif kind.settings.dataset == "chaos":
        own = "a patient's folder in CHAOS's layout"
    else:
        own = "a folder of DICOM files"
    if len(kind.channels) == 1:
        return f"one NIfTI file, {own}, or the DICOM files of one series"
    return (
        f"{own}, <case>_0000.nii.gz to <case>_{len(kind.channels) - 1:04d}.nii.gz, or "
        f"DICOM folders named {', '.join(kind.channels)}"
    )
