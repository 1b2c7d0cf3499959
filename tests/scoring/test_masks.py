"""From score maps to masks on the scan's grid."""

import numpy as np
import pytest
from finished_run import FOUND, box, scores_of, settings, volume

from cldf_dist.data.slices import prepare_volume
from cldf_dist.scoring.masks import (
    PatientScores,
    native_scores,
    object_mask,
    open_slices,
    otsu_mask,
)

SPACING = (1.0, 1.0, 2.0)


def patient(name=FOUND[0]):
    scan = volume(name)
    slices, geometry = prepare_volume(scan, settings("runs").data)
    return scores_of(name, slices), geometry


@pytest.mark.parametrize("name", FOUND[:2])  # the second file has another orientation
def test_mask_of_perfect_scores_is_the_object(name):
    scores, geometry = patient(name)
    native, allowed = native_scores(scores, "cldf", geometry, 0.5)
    mask = object_mask(native, allowed, 0.5, spacing=SPACING)
    np.testing.assert_array_equal(mask, volume(name).mask)


def test_gate_empties_the_slices_that_the_classifier_calls_negative():
    scores, geometry = patient()
    scores.probability[2] = 0.49
    native, allowed = native_scores(scores, "cldf", geometry, 0.5)
    mask = object_mask(native, allowed, 0.5, spacing=SPACING)
    expected = box()
    expected[:, :, 2] = False
    np.testing.assert_array_equal(mask, expected)


def test_gate_at_zero_is_open_everywhere():
    scores, _ = patient()
    scores.probability[:] = 0.0
    assert open_slices(scores, 0.0).all()


def test_nothing_outside_the_subject_is_ever_object():
    scores, geometry = patient()
    scores.scores["cldf"][:] = 1.0
    native, allowed = native_scores(scores, "cldf", geometry, 0.0)
    mask = object_mask(native, allowed, 0.5, spacing=SPACING)
    np.testing.assert_array_equal(mask, volume(FOUND[0]).body_mask)


def test_score_at_the_cut_is_not_object():
    mask = object_mask(
        np.full((2, 2, 2), 0.5, np.float32), np.ones((2, 2, 2), bool), 0.5, spacing=SPACING
    )
    assert not mask.any()


def test_small_components_are_removed_by_volume():
    scores = box().astype(np.float32)  # 32 voxels of 2 mm^3: 0.064 ml
    scores[12, 12, 0] = 1.0  # 0.002 ml
    everywhere = np.ones(scores.shape, bool)

    def kept(min_ml):
        return object_mask(scores, everywhere, 0.5, spacing=SPACING, min_component_ml=min_ml)

    np.testing.assert_array_equal(kept(0.0), scores > 0)
    np.testing.assert_array_equal(kept(0.004), box())
    np.testing.assert_array_equal(kept(0.064), box())
    assert not kept(0.065).any()


def test_otsu_finds_the_object_in_each_slice_at_its_own_level():
    scores, geometry = patient()
    scores.scores["cldf"][3] *= 0.1  # far below any single threshold of the other slice
    mask = otsu_mask(scores, "cldf", geometry, 0.5)
    np.testing.assert_array_equal(mask, box())


def test_otsu_respects_gate_and_component_size():
    scores, geometry = patient()
    assert not otsu_mask(scores, "cldf", geometry, 0.95).any()
    assert not otsu_mask(scores, "cldf", geometry, 0.5, min_component_ml=1.0).any()


def test_otsu_of_constant_scores_is_empty():
    scores, geometry = patient()
    assert not otsu_mask(scores, "cdm", geometry, 0.5).any()


def test_scores_survive_the_disk(tmp_path):
    scores, _ = patient()
    scores.save(tmp_path)
    read = PatientScores.load(tmp_path, FOUND[0])
    assert read.patient == FOUND[0]
    assert set(read.scores) == set(scores.scores)
    np.testing.assert_array_equal(read.scores["cldf"], scores.scores["cldf"])
    np.testing.assert_array_equal(read.probability, scores.probability)
    np.testing.assert_array_equal(read.body_mask, scores.body_mask)
    assert [path.name for path in tmp_path.iterdir()] == [f"{FOUND[0]}.npz"]
