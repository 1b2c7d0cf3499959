"""Scans that come without labels: found in a file or folder, read as the training data were."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from cldf_dist.config import Data
from cldf_dist.data import brats, dicom
from cldf_dist.data.nifti import Affine, Volume, check_same_grid, read_nifti, stack_channels
from cldf_dist.data.subject import rule_of, subject_of

NIFTI_ENDINGS = (".nii.gz", ".nii")
BRATS_CHANNELS = ("brats", "phantom")  # the data sets whose channels are the four of BraTS


@dataclass(frozen=True)
class ScanKind:
    """What the scans of a run are."""

    settings: Data
    channels: tuple[str, ...]  # what a scan must have, in this order
    hounsfield: bool  # the values are Hounsfield units


@dataclass(frozen=True)
class Scan:
    """A scan that was found, and how to read it: a Volume without a mask."""

    name: str
    read: Callable[[], Volume]


def find_scans(path: str | Path, kind: ScanKind) -> list[Scan]:
    """The scans at `path`: a file, a scan's folder, or a folder of scans.

    Understood are the layout of the training data, NIfTI files named as in nnU-Net
    (`<case>_0000.nii.gz`, one per channel; any name where there is one channel), and DICOM: the
    files of one series, or one folder per channel. Masks beside the scans are not opened.
    """
    path = Path(path).resolve()
    if path.is_file():
        scans = [_scan_of_file(path, kind)]
    elif path.is_dir():
        scans = list(_scans_below(path, kind))
    else:
        raise FileNotFoundError(f"input={path} does not exist")
    if not scans:
        raise ValueError(
            f"input={path} holds no scan; expected {_expected(kind)}, or a folder of such"
        )
    names = [scan.name for scan in scans]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"input={path} holds more than one scan named {', '.join(doubled[:5])}")
    return scans


def _scan_of_file(path: Path, kind: ScanKind) -> Scan:
    if path.name.endswith(NIFTI_ENDINGS):
        if kind.settings.dataset in BRATS_CHANNELS and brats.is_patient_folder(path.parent):
            return _brats_scan(path.parent, kind)
        for scan, files in _nifti_cases(path.parent, kind):
            if path in files:
                return scan
        raise ValueError(
            f"input={path}: the run's scans have {len(kind.channels)} channels "
            f"({', '.join(kind.channels)}); expected {_expected(kind)}"
        )
    files = dicom.dicom_files(path.parent)
    if path in files and len(kind.channels) == 1:
        series = next(group for group in dicom.group_series(files).values() if path in group)
        return _dicom_scan(path.parent.name, [series], kind)
    if path in files:
        raise ValueError(f"input={path} is one of several files; name the folder of the scan")
    raise ValueError(f"input={path} is neither a NIfTI file (.nii, .nii.gz) nor a DICOM file")


def _scans_below(folder: Path, kind: ScanKind) -> Iterator[Scan]:
    """The scans of the folder, or of those in it where it is none itself, at any depth."""
    found = list(_scans_in(folder, kind))
    yield from found
    for below in () if found else sorted(folder.iterdir()):
        if below.is_dir() and not below.name.startswith("."):
            yield from _scans_below(below, kind)


def _scans_in(folder: Path, kind: ScanKind) -> Iterator[Scan]:
    """The scans that lie in the folder itself, or are it."""
    if kind.settings.dataset in BRATS_CHANNELS and brats.is_patient_folder(folder):
        yield _brats_scan(folder, kind)
        return
    cases = _nifti_cases(folder, kind)
    if cases:
        yield from (scan for scan, _ in cases)
        return
    if kind.settings.dataset == "chaos":
        from cldf_dist.data import chaos

        found = chaos.new_scans(kind.settings, folder)
        yield from (Scan(name, read) for name, read in found)
        if found:
            return
    files = dicom.dicom_files(folder)
    by_channel = [
        dicom.dicom_files(folder / name) for name in kind.channels if (folder / name).is_dir()
    ]
    if files and len(kind.channels) == 1:
        yield _dicom_scan(folder.name, [files], kind)
    elif len(by_channel) == len(kind.channels) and all(by_channel):
        yield _dicom_scan(folder.name, by_channel, kind)


def _brats_scan(folder: Path, kind: ScanKind) -> Scan:
    read = partial(brats.read_scan, folder, with_mask=False, subject=rule_of(kind.settings))
    return Scan(folder.name, read)


def _nifti_cases(folder: Path, kind: ScanKind) -> list[tuple[Scan, list[Path]]]:
    """Per case of the folder the scan and its files, one per channel in their order."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.name.endswith(NIFTI_ENDINGS) and not file.name.startswith(".") and file.is_file()
    ]
    by_case: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in files:
        stem = file.name.removesuffix(".gz").removesuffix(".nii")
        case, _, number = stem.rpartition("_")
        if case and len(number) == 4 and number.isdecimal():
            by_case[case][int(number)] = file
        elif len(kind.channels) == 1:
            by_case[stem][0] = file
    found = []
    for case, parts in by_case.items():
        missing = [number for number in range(len(kind.channels)) if number not in parts]
        if missing:
            raise FileNotFoundError(
                f"{folder}: {case} has no {case}_{missing[0]:04d}.nii.gz, the channel "
                f"{kind.channels[missing[0]]}; the run needs {', '.join(kind.channels)}"
            )
        ordered = [parts[number] for number in range(len(kind.channels))]
        found.append((Scan(case, partial(_read_nifti, case, ordered, kind)), ordered))
    return found


def _read_nifti(name: str, files: Sequence[Path], kind: ScanKind) -> Volume:
    scans = [read_nifti(file) for file in files]
    return _volume(name, scans, [str(file) for file in files], kind)


def _dicom_scan(name: str, series: Sequence[Sequence[Path]], kind: ScanKind) -> Scan:
    return Scan(name, partial(_read_dicom, name, series, kind))


def _read_dicom(name: str, groups: Sequence[Sequence[Path]], kind: ScanKind) -> Volume:
    places = [str(files[0].parent) for files in groups]
    series = [dicom.read_series(files, name=place) for files, place in zip(groups, places)]
    scans = [(item.image, item.affine) for item in series]
    volume = _volume(name, scans, places, kind)
    return dataclasses.replace(volume, dicom_files=series[0].files)


def _volume(
    name: str,
    scans: Sequence[tuple[npt.NDArray[Any], Affine]],
    places: Sequence[str],
    kind: ScanKind,
) -> Volume:
    for place, scan in zip(places[1:], scans[1:]):
        check_same_grid(Path(places[0]), scans[0], Path(place), scan)
    image = stack_channels([array for array, _ in scans])
    return Volume(
        patient=name,
        image=image,
        foreground=subject_of(image, rule_of(kind.settings), hounsfield=kind.hounsfield),
        mask=None,
        affine=scans[0][1],
        sources=tuple(places),
        hounsfield=kind.hounsfield,
    )


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
