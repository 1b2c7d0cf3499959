"""The list of methods is what everything else reads: its records fit code and settings."""

import inspect
from typing import get_args, get_type_hints

import pytest

from cldf_dist.config import Config, flatten
from cldf_dist.config.method import Segment
from cldf_dist.inference import score_maps
from cldf_dist.inference.score_maps import SliceBatch
from cldf_dist.methods import METHODS, Role, mark, marked, method_named, names_of, scored_names
from cldf_dist.stages import stage_named


def functions_of_a_batch() -> set[str]:
    """The functions of score_maps.py that take a batch and nothing else."""
    return {
        name
        for name, function in inspect.getmembers(score_maps, inspect.isfunction)
        if function.__module__ == score_maps.__name__
        and [p.annotation for p in inspect.signature(function).parameters.values()]
        == [SliceBatch.__name__]
    }


def test_methods_without_a_decoder_and_functions_of_score_maps_are_the_same() -> None:
    scored = {m.name for m in METHODS if m.role is not Role.ORACLE and not m.has_decoder}
    assert functions_of_a_batch() == scored


def test_names_are_unique_and_in_the_order_of_the_table() -> None:
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert names_of(*Role) == tuple(names)
    assert scored_names() == tuple(name for name in names if name != "oracle_intensity")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_record_names_settings_that_exist(method) -> None:
    known = flatten(Config())
    assert not method.section or any(key.startswith(f"{method.section}.") for key in known)
    assert not method.enabled or known[method.enabled] is True
    assert not method.section or method.section in stage_named("segment").sections


def test_masks_of_new_scans_come_from_our_methods() -> None:
    assert get_args(get_type_hints(Segment)["mask_method"]) == ("auto", *names_of(Role.OURS))


def test_marks_tell_what_saw_masks() -> None:
    assert marked("cldf") == "cldf"
    assert marked("supervised_plus") == "supervised_plus *"
    assert mark("oracle_intensity") == " †"
    assert {m.name for m in METHODS if m.saw_masks} == {
        "supervised_decoder", "supervised_plus", "oracle_intensity",
    }  # fmt: skip


def test_a_name_of_another_version_is_a_baseline_and_its_own_title() -> None:
    unknown = method_named("tomorrows_method")
    assert (unknown.title, unknown.role) == ("tomorrows_method", Role.BASELINE)
