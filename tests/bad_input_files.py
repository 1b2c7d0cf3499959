"""Tiny data sets as users have them, and the ways in which their files go wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from chaos_files import write_t1
from dicom_files import save, series_datasets, write_series
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import HTJ2KLossless, JPEG2000MCLossless, JPEGLosslessSV1

Voxels = npt.NDArray[Any]

SHAPE = (16, 16, 6)
AFFINE = np.diag([-2.0, -2.0, 4.0, 1.0])
MODALITIES = ("flair", "t1", "t1ce", "t2")
PATIENTS = ("case_0", "case_1", "case_2", "case_3")
SECOND = PATIENTS[1]  # the one that is spoiled: what comes before it is prepared already
OBJECT_SLICES = (2, 3)


def brats(root: Path) -> None:
    """A BraTS folder as of 2021; labels 1, 2 and 4 are in two slices of each patient."""
    for number, patient in enumerate(PATIENTS):
        for channel, modality in enumerate(MODALITIES):
            save_nifti(brats_file(root, modality, patient), _scan(10 * number + channel))
        labels = np.zeros(SHAPE, np.uint8)
        labels[4:9, 4:9, 2:4], labels[5, 5, 2:4], labels[6, 6, 2:4] = 2, 1, 4
        save_nifti(brats_file(root, "seg", patient), labels)


def nnunet(root: Path, *, masks: bool = True) -> None:
    """One channel and one label, in masks or in labels.csv."""
    for number, patient in enumerate(PATIENTS):
        save_nifti(root / "imagesTr" / f"{patient}_0000.nii.gz", _scan(number))
        if masks:
            mask = np.zeros(SHAPE, np.uint8)
            mask[4:9, 4:9, 2:4] = 1
            save_nifti(root / "labelsTr" / f"{patient}.nii.gz", mask)
    describe(root)
    if not masks:
        _label_slices(root)


def listed_nnunet(root: Path) -> None:
    """nnU-Net's layout without masks, with a file of labels."""
    nnunet(root, masks=False)


def dicom(root: Path) -> None:
    """A series per patient and a file of labels."""
    for number, patient in enumerate(PATIENTS):
        write_series(root / patient, _scan(number), patient=patient, modality="MR")
    _label_slices(root)


def chaos(root: Path) -> None:
    """T1 in and out of phase of four patients, with masks."""
    for patient in "1234":
        write_t1(root, patient)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "brats": brats,
    "nnunet": nnunet,
    "listed nnunet": listed_nnunet,
    "dicom": dicom,
    "chaos": chaos,
}


def words_of(kind: str, root: Path) -> list[str]:
    """The settings that read what BUILDERS[kind] wrote."""
    labels = [f"data.labels={root / 'labels.csv'}"] if kind in ("listed nnunet", "dicom") else []
    return [f"data.dataset={kind.removeprefix('listed ')}", f"data.root={root}", *labels]


def brats_file(root: Path, modality: str, patient: str = SECOND) -> Path:
    return root / patient / f"{patient}_{modality}.nii.gz"


def save_nifti(path: Path, voxels: Voxels, affine: Voxels = AFFINE) -> None:
    """Write the voxels in the array's own type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine, dtype=voxels.dtype), path)


def voxels_of(path: Path) -> Voxels:
    return np.asanyarray(nib.load(path).dataobj)


def change(path: Path, function: Callable[[Voxels], Voxels]) -> None:
    """Save the voxels of a file again, changed."""
    save_nifti(path, function(voxels_of(path)))


def with_voxel(value: float, kind: str = "float32") -> Callable[[Voxels], Voxels]:
    """To be given to `change`: one voxel of the object has the value."""

    def changed(voxels: Voxels) -> Voxels:
        voxels = voxels.astype(kind)
        voxels[8, 8, 2] = value
        return voxels

    return changed


def save_scaled(path: Path) -> None:
    """Save labels as scaled bytes, as some tools do: 4 comes back as 4.00000024."""
    image = nib.Nifti1Image(voxels_of(path).astype(np.float64), AFFINE)
    image.set_data_dtype(np.uint8)
    nib.save(image, path)


def truncate(path: Path, size: int) -> None:
    """Keep the first `size` bytes; a negative size leaves so many away."""
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file around."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def describe(root: Path, **changes: Any) -> None:
    """Write nnU-Net's dataset.json; None leaves a key out."""
    said = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "tumour": 1}, **changes}
    kept = {key: value for key, value in said.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(kept))


def add_line(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")


def move_slice(root: Path, millimetres: float) -> None:
    """Move one slice of a DICOM series along its normal."""
    path = root / SECOND / "002.dcm"
    dataset = dcmread(path)
    dataset.ImagePositionPatient[2] += millimetres
    dataset.save_as(path)


def mix_series(root: Path) -> None:
    """Add a slice of another series to a folder."""
    (other,) = series_datasets(_scan(9)[:, :, :1], series="2", modality="MR", origin=(0, 0, 90))
    save(root / SECOND / "other.dcm", other)


def compress(root: Path) -> None:
    """Declare a slice to be compressed in a way that no installed decoder knows."""
    path = root / SECOND / "002.dcm"
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = next(filter(_not_decoded, _COMPRESSED))
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)


def lay_again(good: Path, root: Path) -> None:
    """Put a data set back as it was; the files keep their times."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root)


# the last one is in no decoder's list
_COMPRESSED = (JPEGLosslessSV1, HTJ2KLossless, JPEG2000MCLossless)


def _not_decoded(syntax: Any) -> bool:
    try:
        return not get_decoder(syntax).is_available
    except NotImplementedError:
        return True


def _scan(seed: int) -> npt.NDArray[np.int16]:
    """Air around a subject of random brightness."""
    scan = np.zeros(SHAPE, np.int16)
    inside = (12, 12, SHAPE[2])
    scan[2:14, 2:14] = np.random.default_rng(seed).integers(100, 1000, inside)
    return scan


def _label_slices(root: Path, patients: Sequence[str] = PATIENTS) -> None:
    names = "{:03d}".format if (root / PATIENTS[0]).is_dir() else str
    lines = ["patient,slice,tumour"]
    for patient in patients:
        lines += [f"{patient},{names(z)},{int(z in OBJECT_SLICES)}" for z in range(SHAPE[2])]
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
