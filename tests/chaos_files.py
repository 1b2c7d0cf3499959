"""A tiny tree in the layout of CHAOS: MR in two sequences and CT, with masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dicom_files import write_series
from PIL import Image

from cldf_dist.config import Data
from cldf_dist.data.formats.nifti import Volume
from cldf_dist.data.readers.chaos import read_patient

Grays = npt.NDArray[np.uint8]  # (x, y, slices)

SHAPE = (24, 20, 4)
SPACING = (2.0, 1.5, 5.0)  # mm, along (x, y, slices)
IN_PHASE_MS, OUT_PHASE_MS = 4.6, 2.3  # at 1.5 T
ORDER = (2, 0, 3, 1)  # a file number for each slice, from the feet up
GRAYS = {"liver": 63, "right_kidney": 126, "left_kidney": 189, "spleen": 252}
KIDNEYS = "right_kidney+left_kidney"


def organs(shape: tuple[int, int, int] = SHAPE) -> Grays:
    """The gray values of MR, (x, y, slices) in LPS: another liver in every slice but the last,
    which is empty."""
    grays = np.zeros(shape, np.uint8)
    for index in range(shape[2] - 1):
        grays[6 : 11 + index % 4, 5 : 8 + index, index] = 63
    grays[6:9, 13:15, 1] = 126  # x runs to the left, so this is the patient's right
    grays[15:18, 13:15, 1] = 189
    grays[15:18, 6:9, 2] = 252
    return grays


def chaos(root: Path, modality: str = "mr_t1", name: str = "", **more: Any) -> Data:
    """The settings that read `data.object=name` from the tree."""
    return Data(dataset="chaos", root=str(root), modality=modality, object=name, **more)


def read_t1(root: Path, name: str = "") -> Volume:
    """What is read of the first patient that `write_t1` writes."""
    return read_patient(chaos(root, name=name), "MR_1")


def truth(name: str) -> npt.NDArray[np.bool_]:
    """Where the object is in `organs()`."""
    return np.isin(organs(), [GRAYS[part] for part in name.split("+")])


def body(channel: int, shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.int16]:
    """An image (x, y, slices) with air around; channels and slices have other values."""
    image = np.zeros(shape, np.int16)
    inside = image[4:20, 4:17]
    inside += np.arange(inside.shape[0], dtype=np.int16)[:, None, None]
    inside += 10 * np.arange(shape[2], dtype=np.int16) + np.int16(200 * (channel + 1))
    return image


def write_png(path: Path, plane: npt.NDArray[Any]) -> Path:
    """(x, y), or (x, y, colours), as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(plane.swapaxes(0, 1))).save(path)
    return path


def write_t1(
    root: Path,
    patient: str = "1",
    *,
    grays: Grays | None = None,
    ground: bool = True,
    order: Sequence[int] | None = None,
    echo_times: tuple[float | None, float | None] = (IN_PHASE_MS, OUT_PHASE_MS),
    **description: Any,
) -> Path:
    """MR/<patient>/T1DUAL: channel 0 in InPhase, 1 in OutPhase, masks named like InPhase.

    Slice number k is in file number `order[k]`. Further arguments are those of `write_series`.
    """
    grays = organs() if grays is None else grays
    order = range(grays.shape[2]) if order is None else order
    folder = root / "MR" / patient / "T1DUAL"
    for channel, (name, echo_time) in enumerate(zip(("InPhase", "OutPhase"), echo_times)):
        write_series(
            folder / "DICOM_anon" / name,
            body(channel, grays.shape),
            name=lambda index, first=2 - channel: f"IMG-0004-{2 * order[index] + first:05d}.dcm",
            modality="MR",
            series=name,
            spacing=SPACING,
            **({} if echo_time is None else {"EchoTime": echo_time}),
            **description,
        )
    if ground:
        for index, number in enumerate(order):
            write_png(folder / "Ground" / f"IMG-0004-{2 * number + 2:05d}.png", grays[:, :, index])
    return folder


def write_t2(root: Path, patient: str = "1", *, ground: bool = True) -> Path:
    """MR/<patient>/T2SPIR, with masks of the same names."""
    folder, grays = root / "MR" / patient / "T2SPIR", organs()
    name = "IMG-0002-{:05d}".format
    write_series(
        folder / "DICOM_anon",
        body(2),
        name=lambda index: f"{name(index + 1)}.dcm",
        modality="MR",
        spacing=SPACING,
    )
    for index in range(grays.shape[2] if ground else 0):
        write_png(folder / "Ground" / f"{name(index + 1)}.png", grays[:, :, index])
    return folder


def write_ct(
    root: Path,
    patient: str = "2",
    *,
    liver: Grays | None = None,
    ground: bool = True,
    order: Sequence[int] | None = None,
    name: str = "i{:04d},0000b.dcm",
    **description: Any,
) -> Path:
    """CT/<patient>: Hounsfield units with an intercept, masks counted in the files' order."""
    liver = np.where(organs() == 63, 255, 0).astype(np.uint8) if liver is None else liver
    order = range(liver.shape[2]) if order is None else order
    folder = root / "CT" / patient
    stored = body(4, liver.shape)  # 1000 and more, in air 0
    write_series(
        folder / "DICOM_anon",
        stored,
        name=lambda index: name.format(order[index]),
        spacing=SPACING,
        RescaleIntercept=-1024,
        RescaleSlope=1,
        **description,
    )
    for index, number in enumerate(order if ground else ()):
        write_png(folder / "Ground" / f"liver_GT_{number:03d}.png", liver[:, :, index])
    return folder


def write_flat_t1(root: Path, patient: str = "1") -> Path:
    """MR/<patient>/T1DUAL with both echoes of one series directly in DICOM_anon, no masks."""
    folder = root / "MR" / patient / "T1DUAL"
    for channel, echo_time in enumerate((IN_PHASE_MS, OUT_PHASE_MS)):
        write_series(
            folder / "DICOM_anon",
            body(channel),
            name=lambda index, first=2 - channel: f"IMG-0004-{2 * index + first:05d}.dcm",
            modality="MR",
            spacing=SPACING,
            EchoTime=echo_time,
        )
    return folder
