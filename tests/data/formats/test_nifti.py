import gzip
import io
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cldf_dist.data.formats.nifti import read_nifti, write_nifti

AFFINE = np.array([[-0.0, -1.5, 0, 10], [2, 0, 0, -20], [0, 0, 5, 7], [0, 0, 0, 1]], np.float64)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(array, affine, dtype=array.dtype), path)
    return path


def test_written_map_reads_back_with_its_values_and_affine(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    write_nifti(tmp_path / "map.nii.gz", values, AFFINE)
    array, affine = read_nifti(tmp_path / "map.nii.gz")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, values)
    np.testing.assert_array_equal(affine, AFFINE)
    header = nib.load(tmp_path / "map.nii.gz").header
    assert int(header["sform_code"]) == int(header["qform_code"]) == 1
    np.testing.assert_allclose(header.get_qform(), AFFINE, atol=1e-6)
    np.testing.assert_allclose(header.get_zooms(), (2, 1.5, 5))


def test_written_mask_is_uint8(tmp_path: Path) -> None:
    mask = np.zeros((3, 4, 5), bool)
    mask[1, 2, 3] = True
    write_nifti(tmp_path / "mask.nii.gz", mask, AFFINE)
    array, _ = read_nifti(tmp_path / "mask.nii.gz")
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, mask)


def test_same_map_gives_the_same_bytes(tmp_path: Path) -> None:
    values = np.ones((3, 3, 3), np.float32)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, values, AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def packed_in_one_piece(array: np.ndarray[Any, Any], affine: np.ndarray[Any, Any]) -> bytes:
    """The file by nibabel itself, which holds it in memory several times over."""
    kind = np.uint8 if array.dtype in (np.bool_, np.uint8) else np.float32
    image = nib.Nifti1Image(array.astype(kind), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=6, fileobj=packed, mtime=0) as file:
        file.write(image.to_bytes())
    return packed.getvalue()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 7), (3, 1, 9), (128, 96, 11)])
@pytest.mark.parametrize("kind", ["bool", "uint8", "int16", "float16", "float32", ">f4", "float64"])
def test_file_in_slices_has_the_bytes_of_the_file_in_one_piece(
    tmp_path: Path, shape: tuple[int, int, int], kind: str
) -> None:
    """In every memory order; a NaN in a map is kept."""
    noise = np.random.default_rng(0).normal(size=shape) * 50
    values = noise > 40 if kind == "bool" else np.abs(noise).astype(kind)
    if values.dtype.kind == "f":
        values[0, 0, 0] = np.nan
    expected = packed_in_one_piece(values, AFFINE)
    padded = np.pad(values, 1)
    orders = (
        values,
        np.asfortranarray(values),
        padded[1:-1, 1:-1, 1:-1],
        values[::-1].copy()[::-1],
    )
    for number, array in enumerate(orders):
        write_nifti(tmp_path / f"{number}.nii.gz", array, AFFINE)
        assert (tmp_path / f"{number}.nii.gz").read_bytes() == expected


def test_writing_holds_no_copy_of_the_volume(tmp_path: Path) -> None:
    """As Python counts memory, numpy's included; the compressor's own is the same for any size."""
    slices = np.random.default_rng(0).random((128, 128, 4)) < 0.1
    volumes = [np.tile(slices, (1, 1, count)) for count in (1, 40)]
    write_nifti(tmp_path / "imports.nii.gz", volumes[0], AFFINE)
    peaks = []
    for volume in volumes:
        tracemalloc.start()
        write_nifti(tmp_path / "mask.nii.gz", volume, AFFINE)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert volumes[1].nbytes > 2_500_000
    assert peaks[1] < peaks[0] + 50_000


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "map.nii.gz"
    write_nifti(path, np.ones((2, 2, 2), np.float32), AFFINE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="shape"):
        write_nifti(path, np.ones((2, 2), np.float32), AFFINE)
    with pytest.raises(Exception):  # noqa: B017, PT011 - nibabel's own complaint about the affine
        write_nifti(path, np.ones((2, 2, 2), np.float32), np.eye(3))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_mask_is_written_as_nii_gz_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.nii\.gz"):
        write_nifti(tmp_path / "mask.nii", np.ones((2, 2, 2), np.uint8), AFFINE)


def test_unpacked_and_second_version_files_are_read(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    plain = save(tmp_path / "scan.nii", values)
    nib.save(nib.Nifti2Image(values, AFFINE), tmp_path / "second.nii.gz")
    for path in (plain, tmp_path / "second.nii.gz"):
        array, affine = read_nifti(path)
        assert array.dtype == np.int16
        np.testing.assert_array_equal(array, values)
        np.testing.assert_array_equal(affine, AFFINE)


@pytest.mark.parametrize(
    ("stored", "read"), [("int64", "int32"), ("uint32", "int32"), ("float64", "float32")]
)
def test_wide_numbers_are_narrowed(tmp_path: Path, stored: str, read: str) -> None:
    values = np.arange(8).reshape(2, 2, 2).astype(stored)
    array, _ = read_nifti(save(tmp_path / "scan.nii.gz", values))
    assert array.dtype == np.dtype(read)
    np.testing.assert_array_equal(array, values)


def test_integers_beyond_32_bits_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", np.full((2, 2, 2), 2**40, np.int64))
    with pytest.raises(ValueError, match=r"scan\.nii\.gz.*must fit 32 bits"):
        read_nifti(path)


def test_trailing_axes_of_length_one_are_dropped(tmp_path: Path) -> None:
    array, _ = read_nifti(save(tmp_path / "scan.nii.gz", np.ones((2, 3, 4, 1), np.int16)))
    assert array.shape == (2, 3, 4)


def test_series_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "series.nii.gz", np.ones((2, 3, 4, 5), np.int16))
    with pytest.raises(ValueError, match=r"series\.nii\.gz must be three-dimensional.*5\)"):
        read_nifti(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    values = np.ones((2, 3, 4), np.float32)
    values[0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"scan\.nii\.gz: 1 voxels are not finite"):
        read_nifti(save(tmp_path / "scan.nii.gz", values))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.nii\.gz does not exist"):
        read_nifti(tmp_path / "absent.nii.gz")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    values = np.random.default_rng(0).integers(0, 1000, (16, 16, 16)).astype(np.int16)
    path = save(tmp_path / f"short{suffix}", values)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"short\.nii.* is truncated or damaged"):
        read_nifti(path)


def test_flipped_byte_is_found(tmp_path: Path) -> None:
    """In a stored (uncompressed) gzip block only the checksum can tell."""
    plain = save(tmp_path / "scan.nii", np.ones((16, 16, 16), np.int16)).read_bytes()
    packed = bytearray(gzip.compress(plain, compresslevel=0))
    packed[2000] ^= 1
    path = tmp_path / "flipped.nii.gz"
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"flipped\.nii\.gz is truncated or damaged"):
        read_nifti(path)


@pytest.mark.parametrize("name", ["notes.nii", "notes.nii.gz"])
def test_file_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not a scan at all " * 100)
    with pytest.raises(ValueError, match=r"notes\.nii.* is truncated or damaged"):
        read_nifti(path)


def test_flat_affine_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((2, 2, 2), np.int16), None)
    image.header.set_sform(np.diag([1, 1, 0, 1]), code=1)
    nib.save(image, tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match=r"scan\.nii\.gz: the affine does not describe a grid"):
        read_nifti(tmp_path / "scan.nii.gz")
