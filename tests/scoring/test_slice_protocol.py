"""The slice-level protocol on slices whose every number is known by hand."""

import csv
import dataclasses
import io

import nibabel as nib
import numpy as np
import pytest
from finished_run import settings, volume

from cldf_dist.data.slices import prepare_volume
from cldf_dist.method.slice_metrics import SliceScore, slice_score
from cldf_dist.scoring.masks import PatientScores
from cldf_dist.scoring.slice_protocol import (
    METRICS,
    ProtocolSlice,
    score_slices,
    slice_protocol_csv,
    slice_protocol_summary,
)


@pytest.fixture
def scan(tmp_path):
    """Prepared slices, geometry and foreground of a scan of 16 x 16 x 6 voxels."""
    return prepare_volume(volume("scan"), settings(tmp_path).data)


def patient(scan, score, inside=None):
    """Scores that are `score` (x, y, slices) on the scan's grid."""
    slices, geometry = scan
    maps = np.stack([score[..., index].T for index in geometry.indices]).astype(np.float32)
    if inside is None:
        inside = np.stack([(item.image > -1).any(axis=0) for item in slices])
    closed = np.zeros(len(slices), np.float32)  # no slice passes a gate
    return PatientScores("scan", {"cldf": maps}, closed, inside)


def blobs():
    """A mask with 9 pixels and 4 pixels apart in slice 2, 1 pixel in slice 4."""
    mask = np.zeros((16, 16, 6), bool)
    mask[3:6, 4:7, 2] = True
    mask[10:12, 10:12, 2] = True
    mask[8, 9, 4] = True
    return mask


def test_every_slice_with_an_object_pixel_counts_and_no_gate_is_asked(scan):
    truth = blobs()
    both = score_slices(patient(scan, 0.2 + 0.5 * truth), truth, scan[1], ["cldf"])
    assert [one.index for one in both] == [2, 4]  # data.min_object_pixels is 4
    assert both[0].plain == SliceScore(1.0, 1.0, 0.0, 0.0)
    assert both[1].plain == both[1].largest_component == SliceScore(1.0, 1.0, 0.0, 0.0)


def test_largest_component_is_scored_beside_the_whole(scan):
    (one, _) = score_slices(patient(scan, 1.0 * blobs()), blobs(), scan[1], ["cldf"])
    assert one.largest_component.dice == pytest.approx(2 * 9 / (9 + 13), abs=1e-5)
    assert one.largest_component.iou == pytest.approx(9 / 13, abs=1e-5)
    assert one.largest_component.hd95_pixels > 0


def test_false_alarms_on_other_slices_cost_nothing(scan):
    truth = blobs()
    score = 1.0 * truth
    clean = score_slices(patient(scan, score), truth, scan[1], ["cldf"])
    score[2:9, 2:9, [1, 3]] = 1
    assert score_slices(patient(scan, score), truth, scan[1], ["cldf"]) == clean


@pytest.mark.parametrize("outside", [-9.0, 9.0])
def test_otsu_sees_the_whole_slice_with_the_outside_at_its_lowest(scan, outside):
    """Of 49 subject pixels 1 is low, 44 are in the middle, 4 high. Otsu among them would keep the
    4; with 207 pixels around them at the lowest it keeps 48."""
    truth = np.zeros((16, 16, 6), bool)
    truth[6:8, 6:8, 2] = True
    score = np.full((16, 16, 6), outside)  # what lies there is not seen
    score[4:11, 4:11] = -0.6
    score[4, 4] = -1.0
    score[truth] = 0.0
    subject = np.zeros((6, 16, 16), bool)
    subject[:, 4:11, 4:11] = True
    (one,) = score_slices(patient(scan, score, subject), truth, scan[1], ["cldf"])
    assert one.plain.iou == pytest.approx(4 / 48, abs=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (37.5, -2), (0.003, 4)])
def test_scale_and_offset_of_the_score_change_nothing(scan, scale, shift):
    noise = np.random.default_rng(0).random((16, 16, 6))
    score = np.round(64 * noise) / 64 + blobs()
    expected = score_slices(patient(scan, score), blobs(), scan[1], ["cldf"])
    changed = patient(scan, scale * score + shift)
    assert score_slices(changed, blobs(), scan[1], ["cldf"]) == expected


def test_constant_scores_and_slices_that_were_not_prepared_predict_nothing(scan):
    truth = blobs()
    nothing = slice_score(np.zeros((16, 16), bool), truth[..., 2])
    flat = patient(scan, np.full(truth.shape, 0.3))
    (one, _) = score_slices(flat, truth, scan[1], ["cldf"])
    assert one.plain == one.largest_component == nothing
    slices, geometry = scan
    fewer = ([slices[0], slices[4]], dataclasses.replace(geometry, indices=(0, 4)))
    one, other = score_slices(patient(fewer, 1.0 * truth), truth, fewer[1], ["cldf"])
    assert one.plain == nothing
    assert other.plain.dice == 1.0


def test_slices_are_those_of_the_keys_however_the_file_is_turned(scan):
    truth, score = blobs(), np.random.default_rng(1).random((16, 16, 6))
    expected = score_slices(patient(scan, score), truth, scan[1], ["cldf"])
    turn = np.array([[2, 1], [0, -1], [1, -1]])  # the slices lie along another axis, reversed
    affine = np.array(scan[1].affine) @ nib.orientations.inv_ornt_aff(turn, truth.shape)
    turned = nib.orientations.apply_orientation(truth, turn)
    geometry = dataclasses.replace(
        scan[1],
        shape=turned.shape,
        affine=tuple(map(tuple, affine.tolist())),
        axes="".join(nib.aff2axcodes(affine)),
    )
    assert turned.shape != truth.shape
    assert score_slices(patient(scan, score), turned, geometry, ["cldf"]) == expected


def slice_of_protocol(index, method, dice, largest):
    score = SliceScore(dice, dice / 2, 10 * dice, 20 * dice)
    best = SliceScore(largest, largest / 2, 10 * largest, 20 * largest)
    return ProtocolSlice("somebody", index, method, score, best)


def test_mean_and_standard_deviation_are_over_slices():
    slices = [slice_of_protocol(1, "cldf", 0.2, 0.5), slice_of_protocol(2, "cldf", 0.8, 0.5)]
    summary = slice_protocol_summary(slices, ["cldf", "new"])
    row, largest = summary["methods"]["cldf"], summary["methods_largest_component"]["cldf"]
    assert row["dice"] == {"mean": pytest.approx(0.5), "std": pytest.approx(0.3)}
    assert row["iou"] == {"mean": pytest.approx(0.25), "std": pytest.approx(0.15)}
    assert row["hd95_pixels"] == {"mean": pytest.approx(5), "std": pytest.approx(3)}
    assert row["hd95_contour_pixels"] == {"mean": pytest.approx(10), "std": pytest.approx(6)}
    assert row["num_slices"] == largest["num_slices"] == 2
    assert largest["dice"] == {"mean": 0.5, "std": 0.0}
    nothing = {metric: {"mean": None, "std": None} for metric in METRICS}
    assert summary["methods"]["new"] == {**nothing, "num_slices": 0}


def test_table_of_slices_has_one_line_a_slice_and_method():
    slices = [slice_of_protocol(7, "cldf", 0.25, 0.5), slice_of_protocol(7, "cdm", 0.125, 0.0)]
    first, second = csv.DictReader(io.StringIO(slice_protocol_csv(slices)))
    assert (first["patient"], first["slice"], first["method"]) == ("somebody", "7", "cldf")
    assert (first["dice"], first["hd95_contour_pixels_largest_component"]) == ("0.25", "10.0")
    assert (second["method"], second["hd95_pixels"]) == ("cdm", "1.25")
