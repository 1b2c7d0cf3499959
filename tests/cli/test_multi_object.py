"""Several objects by one command: a run for each, and label maps of them all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cldf_dist.__main__ import main
from cldf_dist.cli.multi_object import mask_method, merge_new_scans, one_per_object
from cldf_dist.config import load
from cldf_dist.data.formats.nifti import read_nifti, write_nifti
from cldf_dist.data.readers.phantom import CHANNELS, PhantomSettings, phantom_patient

DEBUG = str(Path(__file__).resolve().parents[2] / "configs" / "debug.yaml")
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def write_study(root: Path) -> Path:
    """An nnU-Net folder of nine phantom heads: lesions, and a bright block in every other slice."""
    settings = PhantomSettings(num_patients=9, num_slices=6, grid_size=32)
    for index in range(9):
        image, mask, affine = phantom_patient(index, settings)
        labels = (mask > 0).astype(np.uint8)
        labels[10:16, 10:16, 1::2] = 2
        image = np.where(labels == 2, 4 * image, image)
        for number, values in enumerate(image):
            name = f"head_{index}_{number:04d}.nii.gz"
            write_nifti(root / "imagesTr" / name, values.astype(np.float32), affine)
        write_nifti(root / "labelsTr" / f"head_{index}.nii.gz", labels, affine)
    about = {
        "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
        "labels": {"background": 0, "lesion": 1, "block": 2},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def part_file(name: str) -> Path:
    return Path(f"{name}_mask.nii.gz")


def test_objects_become_runs_of_their_own() -> None:
    config = load([DEBUG], ["name=study", "data.dataset=brats", "data.root=x", "output=out"])
    assert one_per_object(config) == [config]
    words = ["name=study", "data.dataset=brats", "data.root=x", "input=in", "output=out"]
    config = load([DEBUG], [*words, "data.object=each"])
    parts = one_per_object(config)
    names = ["whole_tumour", "tumour_core", "enhancing_tumour"]
    assert [part.data.object for part in parts] == names
    assert [part.name for part in parts] == [f"study/{name}" for name in names]
    assert [part.output for part in parts] == [f"out/{name}" for name in names]
    config = load([DEBUG], [*words, "data.object='tumour_core+enhancing_tumour,whole_tumour'"])
    assert [part.data.object for part in one_per_object(config)] == [
        "tumour_core+enhancing_tumour",
        "whole_tumour",
    ]
    config = load([DEBUG], [*words, "data.object='tumour_core, whole_tumour'"])
    assert [part.data.object for part in one_per_object(config)] == ["tumour_core", "whole_tumour"]
    for wrong in ("tumour_core,,whole_tumour", "tumour_core,tumour_core", "liver,tumour_core"):
        with pytest.raises(ValueError, match=r"data\.object must"):
            load([DEBUG], [*words, f"data.object='{wrong}'"])


def test_the_most_probable_object_wins_where_masks_overlap(tmp_path: Path) -> None:
    config = load([DEBUG], [f"output={tmp_path}", "input=in", "data.object=each"])
    config = load(
        [DEBUG],
        [f"output={tmp_path}", "input=in", "data.dataset=nnunet", "data.root=x"],
    )
    masks = {"liver": [1, 1, 0, 0], "spleen": [0, 1, 1, 0]}
    chances = {"liver": [0.9, 0.6, 0.2, 0.1], "spleen": [0.1, 0.7, 0.8, 0.4]}
    parts = []
    for name in masks:
        folder = tmp_path / name
        shape = (4, 1, 1)
        mask = np.array(masks[name], np.uint8).reshape(shape)
        write_nifti(folder / "ann_mask.nii.gz", mask, AFFINE)
        chance = np.array(chances[name], np.float32).reshape(shape)
        write_nifti(folder / "ann_probability.nii.gz", chance, AFFINE)
        words = [f"output={folder}", "input=in", "data.dataset=nnunet", "data.root=x"]
        parts.append(load([DEBUG], [*words, f"data.object={name}"]))
    write_nifti(tmp_path / "spleen" / "only_here_mask.nii.gz", mask, AFFINE)
    write_nifti(tmp_path / "liver" / "only_here_mask.nii.gz", mask, AFFINE)  # of an earlier call
    written = [[part_file(name) for name in names] for names in (("ann",), ("ann", "only_here"))]
    assert merge_new_scans(config, parts, written) == [tmp_path / "ann_labels.nii.gz"]
    labels, affine = read_nifti(tmp_path / "ann_labels.nii.gz")
    assert labels.ravel().tolist() == [1, 2, 2, 0]
    np.testing.assert_allclose(affine, AFFINE)
    names = json.loads((tmp_path / "labels.json").read_text())
    assert names == {"background": 0, "liver": 1, "spleen": 2}


def test_an_unknown_object_is_told_before_the_first_one_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_study(tmp_path / "study")
    words = [DEBUG, "data.dataset=nnunet", f"data.root={root}", f"runs={tmp_path / 'runs'}"]
    assert main(["run", *words, "data.object=lesion,blok"]) == 1
    assert "must be one of lesion, block, or several" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_another_split_than_the_one_that_was_drawn_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_study(tmp_path / "study")
    words = [
        *("prepare", DEBUG, "data.dataset=nnunet", f"data.root={root}", "data.object=each"),
        *(f"runs={tmp_path / 'runs'}", "tracking.enabled=false", "name=heads"),
    ]
    assert main(words) == 0
    held = json.loads((tmp_path / "runs" / "heads" / "splits.json").read_text())
    for name in ("lesion", "block"):
        manifest = tmp_path / "runs" / "heads" / name / "prepare" / "manifest.json"
        assert json.loads(manifest.read_text())["splits"] == held
    capsys.readouterr()
    assert main([*words, "data.split_seed=4"]) == 1
    assert "splits.json was drawn with" in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_segments_every_object_of_a_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_study(tmp_path / "study")
    words = [
        *(DEBUG, "data.dataset=nnunet", f"data.root={root}", "data.object=each", "name=heads"),
        *(f"runs={tmp_path / 'runs'}", "tracking.enabled=false", "evaluate.upper_bound=false"),
        *("cg_diff.enabled=false", "cg_cdm.enabled=false"),
    ]
    assert main(["run", *words]) == 0
    assert "multi_object" in capsys.readouterr().out
    study = tmp_path / "runs" / "heads"
    assert json.loads((study / "multi_object" / "labels.json").read_text()) == {
        "background": 0,
        "lesion": 1,
        "block": 2,
    }
    splits = json.loads((study / "splits.json").read_text())
    files = sorted((study / "multi_object" / "masks").iterdir())
    assert [file.name for file in files] == [f"{name}.nii.gz" for name in splits["test"]]
    for file in files:
        labels, affine = read_nifti(file)
        truth, true_affine = read_nifti(root / "labelsTr" / file.name)
        assert labels.shape == truth.shape
        np.testing.assert_allclose(affine, true_affine, atol=1e-4)
        for value, name in ((1, "lesion"), (2, "block")):
            segment = study / name / "segment"
            mask = read_nifti(segment / "masks" / mask_method(segment) / file.name)[0] > 0
            assert not (labels == value)[~mask].any()
            assert np.isin(labels[mask], (1, 2)).all()
    scans = [*words, f"input={root / 'imagesTr'}", f"output={tmp_path / 'out'}"]
    assert main(["segment", *scans]) == 0
    assert len(list((tmp_path / "out").glob("head_*_labels.nii.gz"))) == 9
    only: Any = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert only == ["block", "lesion"]
