import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cldf_dist.config import Data
from cldf_dist.data.formats.nifti import Volume
from cldf_dist.data.readers.brats import brats_patients, read_scan
from cldf_dist.data.slices import (
    DARKEST,
    Geometry,
    Slice,
    body_mask,
    dequantise,
    prepare_volume,
    quantise,
    resampling_weights,
    slice_key,
    to_native,
)
from cldf_dist.data.splits import read_splits, split_patients

SETTINGS = Data(image_size=48, min_object_pixels=4)
ORIENTATIONS = ["LPS", "RAS", "PIR", "SLA", "AIL", "IRP"]


def development_data() -> Path:
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("CLDF_DATA", default))
    if not (folder / "brats2021").is_dir():
        pytest.skip(f"no development data: set CLDF_DATA to its folder ({folder} has no brats2021)")
    return folder


def head(orientation: str = "LPS", with_mask: bool = True) -> Volume:
    """An ellipsoid with a ball on the patient's left, at the back; voxels 2 x 1.5 x 5 mm."""
    shape, spacing = (40, 56, 12), np.array([2, 1.5, 5])
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    inside = ((x - 18) / 14) ** 2 + ((y - 27) / 22) ** 2 + ((z - 6) / 5.2) ** 2 < 1
    ball = ((x - 25) * 2) ** 2 + ((y - 37) * 1.5) ** 2 + ((z - 6) * 5) ** 2 < 11**2
    noise = np.random.default_rng(0).normal(size=(2, *shape))
    image = np.where(inside, 100 + 10 * noise + 40 * ball, 0).astype(np.float32)
    affine = np.diag([*(spacing * (-1, -1, 1)), 1.0])
    affine[:3, 3] = (12, -7, 30)
    start = nib.orientations.axcodes2ornt("LPS")
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(orientation))
    turned = [nib.orientations.apply_orientation(channel, turn) for channel in image]
    return Volume(
        patient="case_1",
        image=np.stack(turned),
        body_mask=nib.orientations.apply_orientation(inside, turn),
        mask=nib.orientations.apply_orientation(ball & inside, turn) if with_mask else None,
        affine=affine @ nib.orientations.inv_ornt_aff(turn, shape),
    )


def stacked_masks(slices: list[Slice]) -> np.ndarray:
    return np.stack([item.mask for item in slices if item.mask is not None]).astype(np.float32)


def dice(left: np.ndarray, right: np.ndarray) -> float:
    return float(2 * (left & right).sum() / (left.sum() + right.sum()))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("image_size", [32, 96])
def test_prepared_mask_returns_to_its_voxels(orientation: str, image_size: int) -> None:
    volume = head(orientation)
    slices, geometry = prepare_volume(volume, Data(image_size=image_size))
    native = to_native(stacked_masks(slices), geometry) > 0.5
    assert geometry.axes == orientation
    assert volume.mask is not None
    assert native.shape == volume.mask.shape == geometry.shape
    assert geometry.affine == tuple(map(tuple, volume.affine.tolist()))
    assert geometry.spacing == pytest.approx(volume.spacing)
    assert dice(native, volume.mask) > 0.9


@pytest.mark.parametrize("orientation", ORIENTATIONS[1:])
def test_slices_do_not_depend_on_the_orientation_of_the_file(orientation: str) -> None:
    expected, _ = prepare_volume(head(), SETTINGS)
    found, _ = prepare_volume(head(orientation), SETTINGS)
    assert [item.key for item in found] == [item.key for item in expected]
    for left, right in zip(found, expected):
        np.testing.assert_array_equal(left.image, right.image)
        np.testing.assert_array_equal(left.mask, right.mask)


def test_rows_run_to_the_back_and_columns_to_the_patients_left() -> None:
    slices, _ = prepare_volume(head("RAS"), SETTINGS)
    middle = next(item for item in slices if item.index == 6)
    assert middle.mask is not None
    rows, columns = np.nonzero(middle.mask)
    assert rows.mean() > 0.6 * SETTINGS.image_size
    assert columns.mean() > 0.6 * SETTINGS.image_size


def test_pixels_are_square_in_mm_around_the_subject() -> None:
    _, geometry = prepare_volume(head(), SETTINGS)
    x0, x1, y0, y1 = geometry.box
    assert (x1 - x0) * 2 == pytest.approx((y1 - y0) * 1.5, abs=2)
    slices, _ = prepare_volume(head(), SETTINGS)
    for item in slices:
        inside = body_mask(item.image)
        assert not inside[[0, -1]].any()
        assert not inside[:, [0, -1]].any()


def test_surroundings_are_exactly_minus_one_and_the_subject_is_not() -> None:
    slices, geometry = prepare_volume(head(), SETTINGS)
    for item in slices:
        inside = body_mask(item.image)
        assert item.image.dtype == np.float32
        assert (item.image[:, ~inside] == -1).all()
        assert item.image[:, inside].min() >= DARKEST
        assert item.image.max() <= 1
    insides = np.stack([body_mask(item.image) for item in slices]).astype(np.float32)
    assert dice(to_native(insides, geometry) > 0.5, head().body_mask) > 0.95


def test_subject_reaching_the_edge_of_the_scan_is_padded() -> None:
    volume = head()
    kept = slice(6, 31)
    mask = np.asarray(volume.mask)[kept]
    narrow = Volume("case_1", volume.image[:, kept], volume.body_mask[kept], mask, volume.affine)
    slices, geometry = prepare_volume(narrow, SETTINGS)
    assert geometry.box[0] < 0
    assert geometry.box[1] > narrow.body_mask.shape[0]
    assert dice(to_native(stacked_masks(slices), geometry) > 0.5, mask) > 0.9
    for item in slices:
        assert (item.image[:, :, 0] == -1).all()
        assert (item.image[:, :, -1] == -1).all()


def test_intensities_are_robust_standard_deviations() -> None:
    """A 21-pixel subject with its margin is 23 pixels wide: at that size nothing is resampled."""
    inside = np.zeros((41, 41, 1), bool)
    inside[10:31, 10:31] = True
    values = np.resize(np.arange(101), int(inside.sum()))
    image = np.zeros((1, 41, 41, 1), np.int16)
    image[0][inside] = values
    low, median, high = np.percentile(values, (25, 50, 75))
    volume = Volume("case_1", image, inside, None, np.diag([-1.0, -1, 1, 1]))
    slices, geometry = prepare_volume(volume, Data(image_size=23, clip_low=-1, clip_high=1.2))
    assert geometry.box == (9, 32, 9, 32)
    z = np.clip((values - median) / ((high - low) / 1.349), -1, 1.2)
    expected = np.full((41, 41), -1.0)
    expected[inside[:, :, 0]] = np.clip(2 * (z + 1) / 2.2 - 1, DARKEST, 1)
    np.testing.assert_allclose(slices[0].image[0], expected[9:32, 9:32].T, atol=1e-6)
    assert slices[0].image.max() == 1
    assert slices[0].image[0][body_mask(slices[0].image)].min() == DARKEST


def test_edge_of_the_subject_is_not_mixed_with_its_surroundings() -> None:
    """Only the subject's own voxels make a pixel: its values stay within the subject's range."""
    x, y = np.meshgrid(np.arange(61), np.arange(61), indexing="ij")
    inside = ((x - 30) ** 2 + (y - 30) ** 2 < 25**2)[:, :, None]
    image = np.where(inside, np.random.default_rng(0).uniform(990, 1010, inside.shape), 0)
    image[~inside] = -5000
    settings = Data(image_size=20, clip_low=-1, clip_high=9)
    volume = Volume("case_1", image[None], inside, None, np.diag([-1.0, -1, 1, 1]))
    slices, _ = prepare_volume(volume, settings)
    values = slices[0].image[0][body_mask(slices[0].image)]
    assert values.max() < -0.6  # z = 1 or less, of a range from -1 to 9
    assert values.mean() == pytest.approx(-0.8, abs=0.02)


@pytest.mark.parametrize(("minimum", "label"), [(1, 1), (9, 1), (10, -1)])
def test_label_counts_pixels_of_the_original_scan(minimum: int, label: int) -> None:
    volume = head()
    mask = np.zeros_like(volume.body_mask)
    mask[15:18, 20:23, 6] = True
    labelled = Volume("case_1", volume.image, volume.body_mask, mask, volume.affine)
    slices, _ = prepare_volume(labelled, Data(image_size=16, min_object_pixels=minimum))
    labels = {item.index: item.label for item in slices}
    assert labels.pop(6) == label
    assert set(labels.values()) == {0}


def test_scan_without_mask_has_unknown_labels() -> None:
    slices, _ = prepare_volume(head(with_mask=False), SETTINGS)
    assert {item.label for item in slices} == {-2}
    assert all(item.mask is None for item in slices)


def test_dropped_slices_and_surroundings_come_back_as_the_fill_value() -> None:
    slices, geometry = prepare_volume(head(), Data(image_size=32, min_body_fraction=0.3))
    assert 0 < len(slices) < 12
    assert geometry.indices == tuple(item.index for item in slices)
    ones = np.ones((len(slices), 32, 32), np.float32)
    native = to_native(ones, geometry, fill=-7)
    dropped = sorted(set(range(12)) - set(geometry.indices))
    assert (native[:, :, dropped] == -7).all()
    kept = native[:, :, list(geometry.indices)]
    assert set(np.unique(kept)) == {-7, 1}
    x0, x1, y0, y1 = geometry.box
    assert (kept[max(x0, 0) : x1, max(y0, 0) : y1] == 1).all()


def test_maps_of_the_wrong_shape_are_refused() -> None:
    slices, geometry = prepare_volume(head(), SETTINGS)
    with pytest.raises(ValueError, match=r"case_1: maps must be \(\d+, 48, 48\), got"):
        to_native(np.zeros((len(slices) - 1, 48, 48), np.float32), geometry)


def test_empty_scan_and_flat_channel_are_refused() -> None:
    volume = head()
    nothing = np.zeros_like(volume.body_mask)
    with pytest.raises(ValueError, match="case_1: the scan is empty"):
        prepare_volume(Volume("case_1", volume.image, nothing, None, volume.affine), SETTINGS)
    flat = volume.image.copy()
    flat[1][volume.body_mask] = 5
    with pytest.raises(ValueError, match="case_1, channel 1: half of the body's voxels"):
        prepare_volume(Volume("case_1", flat, volume.body_mask, None, volume.affine), SETTINGS)


def test_geometry_survives_json() -> None:
    _, geometry = prepare_volume(head("PIR"), SETTINGS)
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry


@pytest.mark.parametrize("patient", ["a.b", "a/b", "ä", "a b", "x" * 70])
def test_patient_name_that_cannot_be_a_key_is_refused(patient: str) -> None:
    with pytest.raises(ValueError, match="rename the folder"):
        slice_key(patient, 3)


def test_resampling_by_hand() -> None:
    values = np.array([1.0, 3, 5, 9])
    np.testing.assert_allclose(resampling_weights(4, 2) @ values, [2, 7])
    np.testing.assert_allclose(resampling_weights(4, 4) @ values, values)
    np.testing.assert_allclose(resampling_weights(2, 4) @ values[:2], [1, 1.5, 2.5, 3])
    np.testing.assert_allclose(resampling_weights(3, 2) @ values[:3], [5 / 3, 13 / 3])


@pytest.mark.parametrize(("num_in", "num_out"), [(205, 128), (128, 205), (7, 5), (1, 3), (3, 1)])
def test_resampling_weights_sum_to_one(num_in: int, num_out: int) -> None:
    weights = resampling_weights(num_in, num_out).toarray()
    assert weights.shape == (num_out, num_in)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=1), 1)


def test_quantised_image_comes_back_to_within_half_a_step() -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (4, 64, 64)).astype(np.float32)
    image[:, :8] = -1
    image[0, 9, 9] = DARKEST
    image[0, 9, 10] = 1
    back = dequantise(quantise(image))
    assert back.dtype == np.float32
    assert np.abs(back - image).max() <= 0.5001 / 32767
    assert (back[:, :8] == -1).all()
    assert back[0, 9, 9] == DARKEST
    assert back[0, 9, 10] == 1
    np.testing.assert_array_equal(body_mask(back), body_mask(image))


def shares(count: int) -> dict[str, float]:
    return {f"p{number:03d}": (number * 37 % 100) / 100 for number in range(count)}


@pytest.mark.parametrize("count", [5, 44, 100])
def test_split_holds_every_patient_once(count: int) -> None:
    splits = split_patients(shares(count), 0.15, 0.25, seed=3)
    together = [name for names in splits.values() for name in names]
    assert sorted(together) == sorted(shares(count))
    assert len(splits["test"]) == max(1, round(0.25 * count))
    assert len(splits["validation"]) == max(1, round(0.15 * count))


def test_split_is_a_function_of_seed_and_patients_alone() -> None:
    patients = shares(44)
    backwards = dict(reversed(patients.items()))
    first = split_patients(patients, 0.15, 0.25, seed=0)
    assert split_patients(backwards, 0.15, 0.25, seed=0) == first
    assert split_patients(patients, 0.15, 0.25, seed=1) != first


def test_every_split_sees_low_and_high_values() -> None:
    patients = {f"p{number}": number / 90 for number in range(90)}
    splits = split_patients(patients, 0.1, 0.2, seed=5)
    for names in splits.values():
        thirds = [int(3 * patients[name]) for name in names]
        assert min(thirds.count(third) for third in range(3)) >= len(names) // 3 - 1


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(ValueError, match="2 patients are too few"):
        split_patients(shares(2), 0.15, 0.25, seed=0)
    with pytest.raises(ValueError, match=r"data\.test_fraction must be in \[0, 1\), got 1\.5"):
        split_patients(shares(9), 0.15, 1.5, seed=0)


def test_splits_file_is_read(tmp_path: Path) -> None:
    splits = {"train": ["b", "a"], "validation": ["c"], "test": ["d"]}
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(splits))
    assert read_splits(path, ["a", "b", "c", "d"]) == splits


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["a", "x"], "validation": ["b"], "test": ["c"]}, "not in the data: x"),
        ({"train": ["a"], "validation": ["b"], "test": ["d"]}, "missing from the file: c"),
        ({"train": ["a", "b"], "validation": ["b"], "test": ["c"]}, "more than once: b"),
        ({"train": ["a", "b"], "validation": [], "test": ["c"]}, "'validation' .* has no patients"),
        ({"train": ["a", "b", "c"]}, "must have exactly the keys train, validation, test"),
        ({"train": "abc", "validation": ["b"], "test": ["c"]}, "'train' .* must be a list"),
        (["a"], "must have exactly the keys"),
    ],
)
def test_wrong_splits_file_names_what_is_wrong(
    tmp_path: Path, splits: object, message: str
) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(splits))
    with pytest.raises(ValueError, match=message):
        read_splits(path, ["a", "b", "c"])


def test_a_splits_file_of_other_data_is_told_in_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ["a"], "validation": ["b"], "test": ["c"]}))
    names = [f"p{number:04}" for number in range(1000)]
    with pytest.raises(ValueError, match=r"file: p0000, .*, p0004 and 995 more;") as caught:
        read_splits(path, [*names, "a", "b", "c"])
    assert len(str(caught.value)) < 300


def test_unreadable_splits_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.splits: .*absent"):
        read_splits(tmp_path / "absent.json", ["a"])
    (tmp_path / "splits.json").write_text("{")
    with pytest.raises(ValueError, match=r"splits\.json is not JSON"):
        read_splits(tmp_path / "splits.json", ["a"])


def test_development_data_returns_to_its_voxels() -> None:
    folder = development_data()
    patients = brats_patients(folder / "brats2021")
    splits = read_splits(folder / "brats_splits.json", patients)
    volume = read_scan(folder / "brats2021" / splits["validation"][0], Data())
    slices, geometry = prepare_volume(volume, Data(image_size=128))
    assert {item.label for item in slices} >= {0, 1}
    native = to_native(stacked_masks(slices), geometry) > 0.5
    assert volume.mask is not None
    assert dice(native, volume.mask) > 0.9
