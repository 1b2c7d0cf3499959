import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chaos_files import (
    GRAYS,
    KIDNEYS,
    ORDER,
    chaos,
    organs,
    read_t1,
    truth,
    write_ct,
    write_png,
    write_t1,
)
from PIL import Image

from cldf_dist.config import Data
from cldf_dist.data.formats.chaos_masks import can_be_written, write_chaos_masks
from cldf_dist.data.formats.nifti import Volume
from cldf_dist.data.readers.chaos import read_patient
from cldf_dist.data.slices import Geometry, prepare_volume


def geometry_of(volume: Volume, data: Data) -> Geometry:
    return prepare_volume(volume, data)[1]


@pytest.mark.parametrize(
    ("gray", "organ"),
    [
        *((56, "liver"), (70, "liver"), (111, "right_kidney"), (135, "right_kidney")),
        *((176, "left_kidney"), (200, "left_kidney"), (241, "spleen"), (255, "spleen")),
    ],
)
def test_organs_of_mr_are_ranges_of_gray(tmp_path: Path, gray: int, organ: str) -> None:
    write_t1(tmp_path, grays=np.where(organs() > 0, gray, 0).astype(np.uint8))
    volume = read_t1(tmp_path, organ)
    np.testing.assert_array_equal(volume.mask, organs() > 0)


@pytest.mark.parametrize("gray", [1, 55, 71, 110, 136, 175, 201, 240])
def test_other_grays_of_mr_are_refused(tmp_path: Path, gray: int) -> None:
    grays = organs()
    grays[0, :2, 1] = gray
    write_t1(tmp_path, grays=grays)
    said = rf"IMG-0004-00004.png: gray values must be 0 or 56-70 liver, .*found \[{gray}\] in 2 pix"
    with pytest.raises(ValueError, match=said):
        read_t1(tmp_path)


@pytest.mark.parametrize(
    "made", [lambda m: m.astype(np.uint8), lambda m: m, lambda m: np.uint8(255) * m]
)
def test_ct_masks_may_hold_1_or_255_in_8_bits_or_1(
    tmp_path: Path, made: Callable[[npt.NDArray[np.bool_]], npt.NDArray[Any]]
) -> None:
    folder = write_ct(tmp_path)
    for index, name in enumerate(sorted((folder / "Ground").iterdir())):
        write_png(name, made(truth("liver")[:, :, index]))
    volume = read_patient(chaos(tmp_path, "ct"), "CT_2")
    np.testing.assert_array_equal(volume.mask, truth("liver"))


def test_other_grays_of_ct_are_refused(tmp_path: Path) -> None:
    write_ct(tmp_path, liver=np.where(organs() == 63, 127, 0).astype(np.uint8))
    with pytest.raises(
        ValueError, match=r"000.png: gray values must be 0 or 1 or 255 liver; .*127"
    ):
        read_patient(chaos(tmp_path, "ct"), "CT_2")


def test_masks_in_colour_are_read_where_they_are_gray(tmp_path: Path) -> None:
    ground = write_t1(tmp_path) / "Ground"
    for index, file in enumerate(sorted(ground.iterdir())):
        write_png(file, np.repeat(organs()[:, :, index, None], 3 + index % 2, axis=2))
    np.testing.assert_array_equal(read_t1(tmp_path).mask, truth("liver"))


@pytest.mark.parametrize("kind", ["colour", "palette", "16 bits", "truncated", "flipped", "empty"])
def test_a_mask_that_is_no_plain_gray_picture_is_named(tmp_path: Path, kind: str) -> None:
    file = write_t1(tmp_path) / "Ground" / "IMG-0004-00004.png"
    content = bytearray(file.read_bytes())
    if kind == "colour":
        write_png(file, np.stack([organs()[:, :, 0], *2 * [organs()[:, :, 1]]], axis=2))
    elif kind == "palette":
        Image.fromarray(organs()[:, :, 1].T.copy()).convert("P").save(file)
    elif kind == "16 bits":
        write_png(file, organs()[:, :, 1].astype(np.uint16))
    elif kind == "flipped":
        content[content.index(b"IDAT") + 12] ^= 255
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2 if kind == "truncated" else 0])
    said = "is no readable PNG" if kind in ("truncated", "flipped", "empty") else "must be a PNG of"
    with pytest.raises(ValueError, match=rf"IMG-0004-00004.png:? .*{said}.*; (fetch|save) it"):
        read_t1(tmp_path)


def check_written(tmp_path: Path, data: Data, patient: str) -> npt.NDArray[np.uint8]:
    """Write the mask of a scan, read it again; the gray values (x, y, slices) that were written."""
    volume = read_patient(data, patient)
    assert volume.mask is not None
    geometry = geometry_of(volume, data)
    scan = tmp_path / "scans" / patient.replace("_", "/")
    copy = tmp_path / "copy"
    shutil.copytree(scan, copy / patient.replace("_", "/"), ignore=shutil.ignore_patterns("*.png"))
    write_chaos_masks(copy, volume.mask, geometry, object_name=data.object)
    again = read_patient(chaos(copy, data.modality, data.object), patient)
    np.testing.assert_array_equal(again.mask, volume.mask)
    assert again.mask_names == volume.mask_names
    written = sorted(file.relative_to(copy).as_posix() for file in copy.rglob("*Ground/*"))
    assert written == sorted(volume.mask_names)  # and no temporary file
    pictures = [Image.open(copy / name) for name in volume.mask_names]
    assert {picture.mode for picture in pictures} == {"L"}
    return np.stack([np.asarray(picture).T for picture in pictures], axis=2)


@pytest.mark.parametrize("name", ["", *GRAYS, KIDNEYS, "left_kidney+right_kidney"])
def test_written_masks_of_mr_are_read_back_voxel_by_voxel(tmp_path: Path, name: str) -> None:
    write_t1(tmp_path / "scans", order=ORDER)
    data = chaos(tmp_path / "scans", name=name, image_size=16)
    written = check_written(tmp_path, data, "MR_1")
    np.testing.assert_array_equal(written, np.where(truth(name or "liver"), organs(), 0))


def test_written_masks_of_ct_are_read_back_voxel_by_voxel(tmp_path: Path) -> None:
    write_ct(tmp_path / "scans", order=ORDER)
    data = chaos(tmp_path / "scans", "ct", image_size=16)
    written = check_written(tmp_path, data, "CT_2")
    np.testing.assert_array_equal(written, np.where(truth("liver"), 255, 0))


def test_kidneys_are_told_apart_by_the_patients_side_whatever_the_axes(tmp_path: Path) -> None:
    """Here columns run to the patient's right and slices to the feet."""
    turned = organs()[::-1, :, ::-1]
    write_t1(tmp_path / "scans", grays=turned, orientation=(-1, 0, 0, 0, 1, 0))
    data = chaos(tmp_path / "scans", name=KIDNEYS, image_size=16)
    written = check_written(tmp_path, data, "MR_1")
    np.testing.assert_array_equal(written, np.where(np.isin(turned, (126, 189)), turned, 0))


def test_kidneys_are_parted_at_the_middle_of_the_subject_not_of_the_picture(tmp_path: Path) -> None:
    write_t1(tmp_path)
    data = chaos(tmp_path, name=KIDNEYS, image_size=16)
    volume = read_patient(data, "MR_1")
    geometry = geometry_of(volume, data)
    x0, x1, y0, y1 = geometry.box
    moved = Geometry(**{**vars(geometry), "box": (x0 + 5, x1 + 5, y0, y1)})
    everywhere = np.ones(volume.body_mask.shape, np.bool_)
    middles = []
    for place in (geometry, moved):
        write_chaos_masks(tmp_path / "masks", everywhere, place, object_name=KIDNEYS)
        picture = np.asarray(Image.open(tmp_path / "masks" / volume.mask_names[0]))
        assert set(picture[0].tolist()) == {126, 189}
        middles.append(int((picture[0] == 126).sum()))
    assert middles == [12, 17]


@pytest.mark.parametrize("name", ["liver+spleen", "right_kidney+liver", f"{KIDNEYS}+liver"])
def test_other_unions_have_no_gray_value_and_are_refused(tmp_path: Path, name: str) -> None:
    write_t1(tmp_path)
    data = chaos(tmp_path, name=name, image_size=16)
    volume = read_patient(data, "MR_1")
    assert volume.mask is not None
    assert not can_be_written(name, scanner="MR")
    with pytest.raises(ValueError, match=r"one gray value per organ and none for .*NIfTI"):
        write_chaos_masks(
            tmp_path / "masks", volume.mask, geometry_of(volume, data), object_name=name
        )
    assert not (tmp_path / "masks").exists()


def test_a_mask_that_does_not_fit_its_scan_is_refused(tmp_path: Path) -> None:
    write_t1(tmp_path)
    data = chaos(tmp_path, image_size=16)
    volume = read_patient(data, "MR_1")
    assert volume.mask is not None
    geometry = geometry_of(volume, data)
    with pytest.raises(ValueError, match=r"MR_1: the mask must be \(24, 20, 4\)"):
        write_chaos_masks(tmp_path, volume.mask[:-1], geometry, object_name="liver")
    nameless = Geometry(**{**vars(geometry), "mask_names": ()})
    with pytest.raises(ValueError, match=r"MR_1: .* a file name per slice, .* 0 names"):
        write_chaos_masks(tmp_path, volume.mask, nameless, object_name="liver")
