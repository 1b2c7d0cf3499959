"""A DICOM series becomes the right volume in the right place, or an error that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import assert_refused, change, read_folder, save, uid, write_series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from cldf_dist.data.formats.dicom import dicom_files, group_series, read_series

IMAGE = np.arange(7 * 5 * 4, dtype=np.int16).reshape(7, 5, 4)  # (x, y, slices)
LEAN = 0.6, 0.8  # cosine and sine, exact in decimals
OBLIQUE = (1.0, 0.0, 0.0, 0.0, LEAN[0], LEAN[1])


def test_rows_and_columns_become_y_and_x(tmp_path: Path) -> None:
    files = write_series(tmp_path, IMAGE)
    series = read_folder(tmp_path)
    np.testing.assert_array_equal(series.image, IMAGE)
    assert series.image.dtype == np.int16
    assert series.files == tuple(files)
    stored = dcmread(files[2])
    assert (stored.Rows, stored.Columns) == (5, 7)
    assert series.image[6, 3, 2] == stored.pixel_array[3, 6]


def test_affine_is_that_of_nifti(tmp_path: Path) -> None:
    """By hand: DICOM's left and back become minus right and minus front."""
    write_series(tmp_path, IMAGE, spacing=(0.5, 0.75, 3.0), origin=(-10.0, 20.0, 30.0))
    expected = [[-0.5, 0, 0, 10], [0, -0.75, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]]
    np.testing.assert_allclose(read_folder(tmp_path).affine, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "orientation", [OBLIQUE, (0, 1, 0, 0, 0, -1), (0, LEAN[0], LEAN[1], 1, 0, 0)]
)
def test_affine_leads_every_voxel_to_its_place(
    tmp_path: Path, orientation: tuple[float, ...]
) -> None:
    """PS3.3, C.7.6.2.1.1, from the headers of each slice, in planes of any orientation."""
    write_series(
        tmp_path, IMAGE, spacing=(0.5, 0.8, 3.0), origin=(-9.0, 8.0, 7.0), orientation=orientation
    )
    series = read_folder(tmp_path)
    for z, file in enumerate(series.files):
        header = dcmread(file, stop_before_pixels=True)
        row, column = np.reshape(header.ImageOrientationPatient, (2, 3)).astype(float)
        between_rows, between_columns = map(float, header.PixelSpacing)
        for x, y in [(0, 0), (6, 0), (0, 4), (3, 2)]:
            place = np.array(header.ImagePositionPatient, float)
            place += row * between_columns * x + column * between_rows * y
            found = series.affine @ [x, y, z, 1]
            np.testing.assert_allclose(found[:3], place * [-1, -1, 1], rtol=0, atol=1e-6)


@given(order=st.permutations(range(4)))
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_order_of_files_never_matters(tmp_path: Path, order: list[int]) -> None:
    files = write_series(tmp_path, IMAGE, orientation=OBLIQUE)
    straight = read_series(files, name="scan")
    shuffled = read_series([files[index] for index in order], name="scan")
    np.testing.assert_array_equal(shuffled.image, straight.image)
    np.testing.assert_array_equal(shuffled.affine, straight.affine)
    assert shuffled.files == straight.files


def test_slices_run_along_their_normal_whatever_the_names_say(tmp_path: Path) -> None:
    """Names and instance numbers descend while positions ascend."""
    files = write_series(tmp_path, IMAGE, name=lambda index: f"{9 - index}.dcm")
    for number, file in enumerate(reversed(files)):
        change(file, InstanceNumber=number + 1)
    assert dicom_files(tmp_path) == files[::-1]
    np.testing.assert_array_equal(read_folder(tmp_path).image, IMAGE)


def test_what_else_a_series_says(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, modality="MR", EchoTime="4.6", MagneticFieldStrength="1.5")
    series = read_folder(tmp_path)
    assert (series.modality, series.echo_time, series.field_strength) == ("MR", 4.6, 1.5)
    write_series(tmp_path, IMAGE)
    series = read_folder(tmp_path)
    assert (series.modality, series.echo_time, series.field_strength) == ("CT", None, None)


def test_nothing_about_the_patient_is_kept(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, patient="secret")
    assert "secret" not in repr(read_folder(tmp_path))


@pytest.mark.parametrize(
    ("values", "step"),
    [({}, 2.0), ({"SpacingBetweenSlices": "2.5"}, 2.5), ({"SpacingBetweenSlices": ""}, 2.0)],
)
def test_a_single_slice_is_as_thick_as_it_says(
    tmp_path: Path, values: dict[str, str], step: float
) -> None:
    write_series(tmp_path, IMAGE[:, :, :1], **values)
    assert read_folder(tmp_path).affine[2, 2] == step


def test_a_single_slice_without_thickness_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE[:, :, :1], SliceThickness=None)
    assert_refused(tmp_path, "000.dcm", "only slice of scan 1", "SliceThickness", "fetch")


def test_positions_count_and_not_the_thickness(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, spacing=(1, 1, 4), SpacingBetweenSlices="1", SliceThickness="9")
    assert read_folder(tmp_path).affine[2, 2] == 4


def test_rounded_positions_are_equally_spaced(tmp_path: Path) -> None:
    files = write_series(tmp_path, IMAGE, spacing=(1, 1, 3))
    change(files[1], ImagePositionPatient=["0", "0.1", "3.04"])
    np.testing.assert_allclose(read_folder(tmp_path).affine[:3, 2], [0, 0, 3])


def test_files_are_found_by_content_and_sorted_by_number(tmp_path: Path) -> None:
    files = write_series(tmp_path, IMAGE, name=lambda index: f"IM{8 + index}")
    save(tmp_path / ".hidden.dcm", dcmread(files[0]))
    save(tmp_path / "DICOMDIR", dcmread(files[0]))
    (tmp_path / "notes.txt").write_text("DICM " * 100)
    (tmp_path / "short").write_bytes(b"DICM")
    (tmp_path / "folder.dcm").mkdir()
    assert [file.name for file in dicom_files(tmp_path)] == ["IM8", "IM9", "IM10", "IM11"]


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="nowhere is not a folder; expected the DICOM files"
    ):
        dicom_files(tmp_path / "nowhere")


def test_no_files_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="scan 1 has no DICOM files; expected one file per"):
        read_series([], name="scan 1")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.dcm does not exist"):
        read_series([tmp_path / "gone.dcm"], name="scan 1")


def test_series_are_told_apart_by_uid_and_echo(tmp_path: Path) -> None:
    """Both echoes of a dual-echo scan are in one series or in two."""
    in_phase = write_series(tmp_path / "in", IMAGE, modality="MR", EchoTime="4.6")
    out_phase = write_series(tmp_path / "out", IMAGE, modality="MR", EchoTime="2.30")
    other = write_series(tmp_path / "other", IMAGE, modality="MR", series="2")
    groups = group_series([*other, *in_phase, *out_phase])
    one, two = uid("anonymous", "MR", "1"), uid("anonymous", "MR", "2")
    assert groups == {(two, None): other, (one, 4.6): in_phase, (one, 2.3): out_phase}


def test_mixed_series_are_counted(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, name="a{}.dcm".format)
    write_series(tmp_path, IMAGE[:, :, :3], name="b{}.dcm".format, series="2")
    assert_refused(
        tmp_path, "scan 1 holds 2 series", "a0.dcm (4), b0.dcm (3)", "one folder per series"
    )


def test_duplicate_positions_are_named(tmp_path: Path) -> None:
    files = write_series(tmp_path, IMAGE)
    save(tmp_path / "copy.dcm", dcmread(files[2]))
    assert_refused(tmp_path, "002.dcm", "copy.dcm", "one place", "remove")


def test_two_echoes_in_a_series_are_recognised(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, name="a{}.dcm".format, EchoTime="2.3")
    write_series(tmp_path, IMAGE, name="b{}.dcm".format, EchoTime="4.6")
    assert_refused(tmp_path, "one place", "one folder per echo")


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ([1], ["000.dcm and 002.dcm", "4.000 mm", "usual are 2.000", "1 slice is missing"]),
        ([3, 4], ["002.dcm and 005.dcm", "6.000 mm", "usual are 2.000", "2 slices are missing"]),
    ],
)
def test_missing_slices_are_counted(tmp_path: Path, gone: list[int], words: list[str]) -> None:
    files = write_series(tmp_path, np.zeros((3, 3, 8), np.int16))
    for index in gone:
        files[index].unlink()
    assert_refused(tmp_path, "scan 1", *words, "fetch the whole series")


def test_a_missing_slice_of_four_is_no_wider_spacing(tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE)[1].unlink()
    assert_refused(tmp_path, "1 slice is missing")


@pytest.mark.parametrize("place", ["4.9", "4.06"])
def test_uneven_spacing_is_refused(tmp_path: Path, place: str) -> None:
    files = write_series(tmp_path, IMAGE)
    change(files[2], ImagePositionPatient=["0", "0", place])
    assert_refused(tmp_path, "usual are", "equally spaced", "resample")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"ImageOrientationPatient": ["1", "0", "0", "0", "0", "1"]},
            ["orientation", "localizers"],
        ),
        ({"PixelSpacing": ["1", "1.1"]}, ["PixelSpacing", "1.1"]),
        ({"Rows": 7, "Columns": 5}, ["rows and columns", "[5, 7]", "[7, 5]"]),
    ],
)
def test_slices_of_another_grid_are_refused(
    tmp_path: Path, values: dict[str, Any], words: list[str]
) -> None:
    files = write_series(tmp_path, IMAGE)
    change(files[2], **values)
    assert_refused(tmp_path, "000.dcm and 002.dcm must have the same", *words)


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    """Positions along the table while the planes lean by 2 degrees."""
    files = write_series(tmp_path, np.zeros((3, 3, 12), np.int16))
    for index, file in enumerate(files):
        change(file, ImagePositionPatient=["0", f"{0.07 * index:.6f}", str(2 * index)])
    assert_refused(tmp_path, "011.dcm lies 0.77 mm beside 000.dcm", "0.50", "gantry", "resample")
