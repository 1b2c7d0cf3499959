"""The page and the pictures of a run whose every number is known by hand."""

import csv
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from finished_run import ALARM, CLEAN, FOUND, TEST_PATIENTS, UNSCORED, make_run, settings
from matplotlib import colors, image

from cldf_dist.config import Segment
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.seed_cam import with_map
from cldf_dist.runs.run import Run
from cldf_dist.scoring import figures as overlays
from cldf_dist.scoring.figures import PatientResult, drawn_slices, write_overlay
from cldf_dist.scoring.mask_files import mask_path, read_mask, truth_path
from cldf_dist.scoring.masks import PatientScores
from cldf_dist.stages import evaluate, report

VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = settings(tmp_path_factory.mktemp("runs"))
    make_run(config)
    for stage in (evaluate, report):
        run = Run(config, stage.__name__.rpartition(".")[2], ())
        run.open()
        run.finish(stage.execute(config, run))
    return config


@pytest.fixture(scope="module")
def page(config):
    return (config.run_folder / "report" / "report.html").read_text()


def result_of(config, patient):
    prepare, segment = config.run_folder / "prepare", config.run_folder / "segment"
    truth = truth_path(prepare, patient)
    return PatientResult(
        PatientScores.load(segment / "scores", patient),
        ShardSet(prepare).geometry(patient),
        "cldf",
        read_mask(mask_path(segment, "cldf", patient)),
        read_mask(truth) if truth.is_file() else None,
    )


def test_page_needs_nothing_from_elsewhere(page):
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", page)
    assert len(sources) == len(TEST_PATIENTS) + 4  # pictures, Dice per patient, three trainings
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)


def test_page_holds_the_table_of_the_summary(config, page):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    strict = json.loads((config.run_folder / "evaluate" / "summary.json").read_text())["strict"]
    for row in strict["methods"].values():
        dice = row["dice"]
        assert f"{dice['mean']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}]" in text
    assert "0.714" in text
    assert "+0.278" in text
    assert "supervised decoder *" in text
    assert "saw the training masks" in text
    assert "oracle Dice †" in text
    assert "object precision 0.875" in text
    assert "object seeds 1,234" in text
    assert "train-diffusion" in text


def test_slice_protocol_has_a_section_of_its_own_behind_the_strict_tables(config, page):
    before, section = page.split("<h2>Slice protocol (for comparison with papers)</h2>")
    section, after = section.split("<h2>", 1)
    assert "under Otsu's threshold" in before.replace("&#39;", "'")
    assert "not comparable with" in section
    assert '<details class="slice_protocol">' in section, "collapsed"
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", section))
    protocol = json.loads((config.run_folder / "evaluate" / "summary.json").read_text())[
        "slice_protocol"
    ]
    for block in ("methods", "methods_largest_component"):
        for row in protocol[block].values():
            dice, hd95 = row["dice"], row["hd95_pixels"]
            assert f"{dice['mean']:.3f} ± {dice['std']:.3f}" in text
            assert f"{hd95['mean']:.1f} ± {hd95['std']:.1f}" in text
    assert text.count("supervised decoder *") == 2
    assert text.count("saw the training masks") == 1
    assert section.count('<tr class="ours">') == section.count('<tr class="reference">') == 2
    assert "Mean ± standard deviation" not in before + after


def test_rows_are_those_of_the_thresholds_whatever_they_are(tmp_path):
    """Some rows are left out and one is of a later version: its name stands for its title."""
    config = settings(tmp_path)
    make_run(config)
    segment = config.run_folder / "segment"
    shutil.rmtree(segment / "masks" / "gradcam")
    shutil.copytree(segment / "masks" / "gradient_map", segment / "masks" / "new_row")
    for path in (segment / "scores").glob("*.npz"):
        scores = PatientScores.load(path.parent, path.stem)
        scores.scores["new_row"] = scores.scores["gradient_map"].copy()
        scores.scores["new_row"][:, 12, 12] = 0.8  # a component of its own
        scores.save(path.parent)
    rule = json.loads((segment / "thresholds.json").read_text())
    rule["thresholds"] = dict.fromkeys(("new_row", "cldf"), 0.5)
    (segment / "thresholds.json").write_text(json.dumps(rule))
    for stage in (evaluate, report):
        run = Run(config, stage.__name__.rpartition(".")[2], ())
        run.open()
        run.finish(stage.execute(config, run))
    evaluated = config.run_folder / "evaluate"
    summary = json.loads((evaluated / "summary.json").read_text())
    strict, protocol = summary["strict"], summary["slice_protocol"]
    for block in ("methods", "methods_otsu", "oracle_threshold"):
        assert list(strict[block]) == ["new_row", "cldf"]
    for block in ("methods", "methods_largest_component"):
        assert list(protocol[block]) == ["new_row", "cldf"]
    assert list(strict["comparisons"]) == ["new_row"]
    for name in ("cases.csv", "slice_protocol.csv"):
        with (evaluated / name).open() as file:
            named = {row["method"] for row in csv.DictReader(file)}
        assert named - {"oracle_intensity"} == {"new_row", "cldf"}
    page = (config.run_folder / "report" / "report.html").read_text()
    scores = page.partition("<h2>On the way to the masks</h2>")[0]
    rows = re.findall(r"<tr class=\"(?:ours)?\">\s*<th>([^<]+)</th>", scores)
    assert rows == ["new_row", "CLDF", "new_row", *["new_row", "CLDF"] * 3]
    with_blob, without = (
        protocol[block]["new_row"]["dice"]["mean"]
        for block in ("methods", "methods_largest_component")
    )
    shown = page.split("<h2>Slice protocol")[1].split("<h3>")[1:3]
    assert with_blob < without
    for dice, table in zip((with_blob, without), shown, strict=True):
        assert f"<td>{dice:.3f} <span" in table
    for text in (page, *((evaluated / n).read_text() for n in ("table.txt", "slice_protocol.txt"))):
        assert "saw the training masks" not in text


def test_page_warns_of_simulated_data_and_of_clinical_use(page):
    assert "not BraTS scores" in page
    assert "research use only" in page


def test_run_name_is_escaped(page):
    assert "CLDF: a&amp;b" in page
    assert "a&b" not in page


def test_page_is_well_formed(page):
    open_tags = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in VOID:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(page)
    assert not open_tags


def test_pictures_come_lowest_dice_first_and_unscored_ones_last(page):
    captions = re.findall(r"<figcaption><b>(\w+)</b> · ", page)
    assert set(captions) == set(TEST_PATIENTS)
    assert captions[:2] == [ALARM, "missed"]
    assert set(captions[-2:]) == {CLEAN, UNSCORED}
    assert "false alarm: no object, yet a mask" in page
    assert "Dice 1.000, HD95 0.0 mm" in page


def test_every_patient_has_a_picture_with_contours_where_there_are_masks(config):
    def pixels_of(patient, colour):
        drawn = image.imread(config.run_folder / "report" / "overlays" / f"{patient}.png")[..., :3]
        panels = drawn[: -int(0.34 * overlays.DOTS_PER_INCH)]  # without the legend
        return int((np.abs(panels - colors.to_rgb(colour)).max(axis=-1) < 0.05).sum())

    for patient in TEST_PATIENTS:
        path = config.run_folder / "report" / "overlays" / f"{patient}.png"
        assert image.imread(path)[..., :3].std() > 0.1
    found, alarm, clean = FOUND[0], ALARM, CLEAN
    assert pixels_of(found, overlays.MASK_COLOUR) > 50
    assert pixels_of(found, overlays.TRUTH_COLOUR) > 50
    assert pixels_of(alarm, overlays.TRUTH_COLOUR) == 0
    assert pixels_of(clean, overlays.MASK_COLOUR) == 0
    assert pixels_of(UNSCORED, overlays.TRUTH_COLOUR) == 0


def test_slices_are_drawn_from_the_object_or_from_the_middle(config):
    assert drawn_slices(result_of(config, FOUND[0]), 3) == [2, 3]
    assert drawn_slices(result_of(config, FOUND[0]), 1) == [2]
    middle = drawn_slices(result_of(config, CLEAN), 2)
    assert len(middle) == 2
    assert set(middle) <= {1, 2, 3, 4}
    assert drawn_slices(result_of(config, ALARM), 2) == middle  # by the truth, which is empty


def test_predicted_object_guides_where_nobody_drew_the_truth(config):
    alarm = dataclasses.replace(result_of(config, ALARM), truth=None)
    assert drawn_slices(alarm, 3) == [2, 3]


def test_one_large_slice_does_not_crowd_out_the_others(config):
    result = result_of(config, FOUND[0])
    truth = np.zeros_like(result.truth)
    truth[2:14, 2:14, 1] = True
    truth[4, 4, [3, 4]] = True
    assert drawn_slices(dataclasses.replace(result, truth=truth), 3) == [1, 3, 4]


def test_picture_does_not_depend_on_the_orientation_of_the_file(config, tmp_path):
    """The same scan stored with permuted and flipped axes looks the same."""
    config = with_map(config, "gradcam")
    result = result_of(config, FOUND[0])
    turn = np.array([[2, 1], [0, -1], [1, -1]])  # x -> third axis, y -> first, flipped, ...
    affine = np.array(result.geometry.affine)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, result.geometry.shape)
    mask, truth = (nib.orientations.apply_orientation(m, turn) for m in (result.mask, result.truth))
    geometry = dataclasses.replace(
        result.geometry,
        shape=mask.shape,
        affine=tuple(map(tuple, affine.tolist())),
        spacing=tuple(np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).tolist()),
        axes="".join(nib.aff2axcodes(affine)),
    )
    assert geometry.axes != result.geometry.axes
    turned = PatientResult(result.scores, geometry, result.method, mask, truth)
    table = ShardSet(config.run_folder / "prepare").split("test")
    for name, which in (("straight", result), ("turned", turned)):
        write_overlay(tmp_path / f"{name}.png", which, table, config)
    straight = image.imread(tmp_path / "straight.png")
    np.testing.assert_array_equal(straight, image.imread(tmp_path / "turned.png"))


def test_seeds_of_a_slice_that_the_gate_calls_negative_are_background(config):
    config = with_map(config, "gradcam")
    scores = result_of(config, FOUND[0]).scores
    seeds = overlays._would_be_seeds(scores, [2, 0], config)
    # the whole object has the top score in slice 2; all other subject pixels the lowest
    np.testing.assert_array_equal(seeds[0] == 1, scores.scores["gradcam"][2] > 0.5)
    np.testing.assert_array_equal(seeds[1] == 0, scores.body_mask[0])
    closed = dataclasses.replace(config, segment=Segment(gate_probability=0.95))
    assert not (overlays._would_be_seeds(scores, [2], closed) == 1).any()


def test_evenly_chosen_pictures_hold_both_ends():
    names = [str(number) for number in range(100)]
    chosen = report._evenly(names, 24)
    assert len(set(chosen)) == 24
    assert (chosen[0], chosen[-1]) == ("0", "99")
    assert report._evenly(names[:5], 24) == names[:5]
