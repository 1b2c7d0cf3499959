"""Promises of what stands on the fields: bounds in words, and the settings that carry a mark."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

import pytest
from annotated_types import Ge, Gt, Interval, Len, MultipleOf

from cldf_dist.config import CHAOS_OBJECTS, FITTED, Config, Data, Mark, flatten, marked
from cldf_dist.config.data import Dataset, Modality
from cldf_dist.config.fields import CheckedWhere, broken_bounds
from cldf_dist.config.method import Condition
from cldf_dist.config.nets import Attention, NoiseSchedule
from cldf_dist.data.readers.datasets import READERS
from cldf_dist.method.features import CONDITIONS
from cldf_dist.method.noise import SCHEDULES
from cldf_dist.nets.attention import BACKENDS

HARMLESS_FITS = (
    "checkpoint_every", "keep_checkpoints", "preview_every", "log_every", "num_workers", "compile",
    "channels_last", "max_skipped_steps",
)  # fmt: skip
HARMLESS = {
    "data.labels", "data.splits", "data.shard_cache", "data.shard_cache_gb",
    "diffusion.net.attention", "diffusion.net.gradient_checkpointing",
    "cache.batch_size", "cache.part", "cache.verify", "cache.verify_processes",
    "segment.batch_size", "segment.tile_pixels",
}  # fmt: skip
IN_CACHE = {
    "gradient_map.timesteps", "gradient_map.num_noise_samples", "gradient_map.smooth_pixels",
    "features.taps", "features.timesteps", "features.noise", "features.num_noise_samples",
    "features.combine_timesteps", "features.combine_noise_samples", "features.precision",
    "features.storage",
    "features.condition", "features.contrast",
    "seeds.rule", "seeds.cam", "seeds.object_threshold", "seeds.background_threshold",
    "seeds.negative_slices",
    "cam.layer", "patch_classifier.enabled", "plus.patch_tap",
}  # fmt: skip


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, Ge(1)] = 1


@dataclass(frozen=True)
class Outer:
    more: Annotated[float, Gt(0)] = 1.0
    half_open: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    half_closed: Annotated[float, Interval(gt=0, le=1)] = 1.0
    even: Annotated[int, MultipleOf(2)] = 2
    widths: Annotated[tuple[Annotated[int, Ge(2), Mark.HARMLESS], ...], Len(2, 2)] = (2, 2)
    kind: Literal["one", "two"] = "one"
    free: int = 0
    inner: Annotated[Inner, CheckedWhere("kind", "two"), Mark.HARMLESS] = Inner()
    paired: Annotated[int, Ge(5), CheckedWhere("inner.size", 0)] = 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"free": -7}, []),
        ({"more": 0.0}, ["more must be > 0, got 0.0"]),
        ({"more": math.nan}, ["more must be > 0, got nan"]),
        ({"half_open": 1.0}, ["half_open must lie in [0, 1), got 1.0"]),
        ({"half_open": -0.1}, ["half_open must lie in [0, 1), got -0.1"]),
        ({"half_open": math.nan}, ["half_open must lie in [0, 1), got nan"]),
        ({"half_closed": 0.0}, ["half_closed must lie in (0, 1], got 0.0"]),
        ({"even": 3}, ["even must be a multiple of 2, got 3"]),
        ({"widths": (2, 1)}, ["widths[1] must be >= 2, got 1"]),
        ({"widths": (3,)}, ["widths must have 2 entries, got [3]"]),
        ({"kind": "three"}, ["kind must be one of one, two, got 'three'"]),
        ({"kind": "two", "inner": Inner(-1)}, ["inner.size must be >= 1, got -1"]),
        ({"kind": "one", "inner": Inner(-1)}, []),
        ({"inner": Inner(0)}, ["paired must be >= 5, got 0"]),
        ({"more": -1.0, "even": 1}, ["more must be > 0, got -1.0", "even must be a multiple of 2"]),
    ],
)
def test_a_broken_bound_is_told_with_path_rule_and_value(
    changes: dict[str, Any], said: list[str]
) -> None:
    found = list(broken_bounds(replace(Outer(), **changes)))
    assert len(found) == len(said)
    assert all(sentence.startswith(expected) for sentence, expected in zip(found, said))


def test_a_mark_on_a_section_marks_all_its_settings() -> None:
    assert marked(Outer, Mark.HARMLESS) == ("inner.size",)
    assert marked(Inner, Mark.HARMLESS) == ()


def test_harmless_settings_are_exactly_these() -> None:
    """A new setting that may differ between two starts of a stage is a decision."""
    of_fits = {f"{section}.fit.{name}" for section in FITTED for name in HARMLESS_FITS}
    assert set(marked(Config, Mark.HARMLESS)) == HARMLESS | of_fits
    assert len(of_fits) == 6 * 8


def test_settings_that_decide_what_is_in_the_cache_are_exactly_these() -> None:
    assert set(marked(Config, Mark.DECIDES_CACHE)) == IN_CACHE


@pytest.mark.parametrize(
    ("mark", "names"),
    [
        # their order is part of the fingerprint of a patient's source
        (Mark.SELECTS_SOURCE, ("dataset", "object", "modality", "subject")),
        (
            Mark.NOT_IN_SHARDS,
            ("root", "labels", "splits", "on_damaged", "shards", "shard_cache", "shard_cache_gb"),
        ),
        (Mark.DRAWS_SPLIT, ("validation_fraction", "test_fraction", "split_seed")),
        (Mark.FROM_CONFIG_FILE, ("labels", "splits")),
        (Mark.HOME_ALLOWED, ("root",)),
    ],
)
def test_marks_of_the_data_are_exactly_these(mark: Mark, names: tuple[str, ...]) -> None:
    assert marked(Data, mark) == names


def test_marked_paths_are_those_of_the_command_line() -> None:
    known = flatten(Config())
    for mark in Mark:
        assert set(marked(Config, mark)) <= set(known), mark
    assert marked(Config, Mark.HOME_ALLOWED) == ("runs", "input", "output", "data.root")
    assert FITTED == (
        "diffusion", "label_tuning", "classifier", "cam", "patch_classifier", "decoder",
    )  # fmt: skip


def test_choices_are_those_that_the_code_knows() -> None:
    for choices, known in (
        (Dataset, READERS),
        (Modality, CHAOS_OBJECTS),
        (Condition, CONDITIONS),
        (NoiseSchedule, SCHEDULES),
        (Attention, (*BACKENDS, "auto")),
    ):
        assert set(get_args(choices)) == set(known)
