import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cldf_dist.maths.scaling import scale_to_unit
from cldf_dist.method.seeds import RULES, SeedCount, seed_labels

CUTS = {"object_threshold": 0.5, "background_threshold": 0.2, "negative_slices": True}


def row(*values: float) -> torch.Tensor:
    return torch.tensor([[values]])  # (1 slice, 1 row, pixels)


GRADIENT = row(0.9, 0.9, 0.1, 0.1, 0.3, 0.5, 0.9)
CAM = row(0.8, 0.1, 0.8, 0.1, 0.3, 0.9, 0.9)
SUBJECT = row(1, 1, 1, 1, 1, 1, 0).bool()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("both", [1, -1, -1, 0, -1, -1, -1]),
        ("cam", [1, 0, 1, 0, -1, 1, -1]),
        ("gradient", [1, 1, 0, 0, -1, -1, -1]),
    ],
)
def test_rules_by_hand(rule, expected):
    seeds = seed_labels(GRADIENT, CAM, SUBJECT, torch.tensor([1]), rule=rule, **CUTS)
    assert seeds.dtype == torch.int8
    assert seeds[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("label", "negative_slices", "value"), [(0, True, 0), (0, False, -1), (-1, True, -1)]
)
def test_slices_without_object_are_all_of_one_kind(label, negative_slices, value):
    thresholds = {**CUTS, "negative_slices": negative_slices}
    seeds = seed_labels(GRADIENT, CAM, SUBJECT, torch.tensor([label]), rule="both", **thresholds)
    assert seeds[0, 0].tolist() == [value] * 6 + [-1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rule=st.sampled_from(RULES))
def test_only_positive_slices_have_object_seeds_and_only_on_the_subject(seed, rule):
    generator = torch.Generator().manual_seed(seed)
    gradient, cam = torch.rand(2, 4, 6, 6, generator=generator)
    subject = torch.rand(4, 6, 6, generator=generator) > 0.3
    label = torch.tensor([1, 0, -1, -2])
    seeds = seed_labels(gradient, cam, subject, label, rule=rule, **CUTS)
    assert not (seeds[1:] == 1).any()
    assert (seeds[~subject] == -1).all()
    assert (seeds[2:] == -1).all()


@pytest.mark.parametrize(("low", "high"), [(0.6, 0.5), (-0.1, 0.5), (0.2, 1.1)])
def test_impossible_cuts_are_refused(low, high):
    thresholds = {"object_threshold": high, "background_threshold": low, "negative_slices": True}
    with pytest.raises(
        ValueError, match=f"got background_threshold {low} and object_threshold {high}"
    ):
        seed_labels(GRADIENT, CAM, SUBJECT, torch.tensor([1]), rule="both", **thresholds)


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="both, cam, gradient, got 'any'"):
        seed_labels(GRADIENT, CAM, SUBJECT, torch.tensor([1]), rule="any", **CUTS)


def test_scaling_looks_at_the_subject_alone():
    scaled = scale_to_unit(row(-100.0, 2.0, 3.0, 4.0, 900.0), row(0, 1, 1, 1, 0).bool())
    assert scaled[0, 0].tolist() == [0, 0, 0.5, 1, 0]


def test_constant_or_empty_slices_scale_to_zero():
    maps = torch.full((2, 3, 3), 7.0)
    subject = torch.ones(2, 3, 3, dtype=torch.bool)
    subject[1] = False
    assert scale_to_unit(maps, subject).abs().max() == 0


def test_quality_by_hand():
    count = SeedCount()
    count.add(torch.tensor([[1, 1, 0]], dtype=torch.int8), torch.tensor([[1, 0, 1]]))
    count.add(torch.tensor([[0, -1]], dtype=torch.int8), torch.tensor([[0, 1]]))
    assert count.slices == 2
    assert count.quality() == {
        "object_precision": 0.5,
        "object_recall": pytest.approx(1 / 3),
        "background_precision": 0.5,
        "object_seeds": 2,
        "background_seeds": 2,
        "object_pixels": 3,
    }
    nothing = SeedCount()
    nothing.add(torch.full((2, 2), -1, dtype=torch.int8), torch.zeros(2, 2))
    assert math.isnan(nothing.quality()["object_precision"])
    assert math.isnan(nothing.quality()["object_recall"])
