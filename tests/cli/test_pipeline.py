import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cldf_dist.__main__ import main
from cldf_dist.data.formats.nifti import read_nifti, write_nifti
from cldf_dist.data.readers.brats import CHANNELS
from cldf_dist.data.readers.phantom import PhantomSettings, phantom_patient
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.methods import CLDF_PLUS, PATCH_FEATURES, Role, names_of
from cldf_dist.runs.run import read_config
from cldf_dist.stages import STAGES, Stage
from cldf_dist.system.files import DamagedShardError

METHODS = names_of(Role.BASELINE, Role.OURS)
UPPER_BOUNDS = names_of(Role.UPPER_BOUND)

TRAININGS = (
    "train-diffusion",
    "tune-label-embedding",
    "train-classifier",
    "train-cam",
    "train-patch-classifier",
)


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file with its time of change and size."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def damage_masks(folder: Path) -> int:
    """Flip a byte in every mask of the shards; how many there were."""
    manifest = json.loads((folder / "manifest.json").read_text())
    masks = 0
    for shard in manifest["shards"]:
        content = bytearray((folder / shard["name"]).read_bytes())
        for sample in shard["samples"]:
            offset, length, _ = sample["mask"]
            content[offset + length - 1] ^= 1
            masks += 1
        (folder / shard["name"]).write_bytes(bytes(content))
    return masks


@pytest.mark.slow
def test_every_stage_of_the_debug_pipeline_finishes(debug_run: Any) -> None:
    for stage in STAGES:
        word = json.loads((debug_run.folder / stage.name / "DONE").read_text())
        assert word["stage"] == stage.name
        assert read_config(debug_run.folder / stage.name / "config.yaml").name == "debug"
    assert not list(debug_run.folder.rglob("*.partial*")), "no temporary file is left behind"
    assert not list(debug_run.folder.rglob(".spool"))


def test_summary_has_every_row(debug_run: Any) -> None:
    summary = json.loads((debug_run.folder / "evaluate" / "summary.json").read_text())
    assert {*METHODS, PATCH_FEATURES, *UPPER_BOUNDS} == set(summary["strict"]["methods"])
    for name, row in (("comparisons", "cldf"), ("comparisons_plus", CLDF_PLUS)):
        assert set(summary["strict"][name]) == set(summary["strict"]["methods"]) - {row}
    assert summary["mask_method"] in ("cldf", CLDF_PLUS)
    assert summary["seeds_plus"]["slices"] == summary["seeds"]["slices"] > 0
    assert (debug_run.folder / "report" / "report.html").stat().st_size > 1000


def test_a_finished_run_is_not_computed_again(
    debug_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(debug_run.folder)
    assert main(["run", *debug_run.words]) == 0
    assert snapshot(debug_run.folder) == before
    said = capsys.readouterr()
    for stage in STAGES:
        assert f"{stage.name}: finished before, in " in said.err
    assert "cldf " in said.out, "the table is printed again"


def test_masks_lie_in_the_geometry_of_their_scan(debug_run: Any) -> None:
    truth = sorted((debug_run.folder / "prepare" / "truth").glob("*.nii.gz"))
    assert len(truth) == 3
    for row in (*METHODS, PATCH_FEATURES, *UPPER_BOUNDS):
        masks = sorted((debug_run.folder / "segment" / "masks" / row).glob("*.nii.gz"))
        assert [path.name for path in masks] == [path.name for path in truth]
        for mask, true in zip(masks, truth):
            mine, theirs = nib.load(mask), nib.load(true)
            assert mine.shape == theirs.shape
            np.testing.assert_array_equal(mine.affine, theirs.affine)
            assert set(np.unique(np.asanyarray(mine.dataobj))) <= {0, 1}
    for path in (debug_run.folder / "segment" / "probability").glob("*.nii.gz"):
        values, _ = read_nifti(path)
        assert 0 <= values.min() <= values.max() <= 1


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.needs], ids=lambda s: s.name)
def test_a_stage_alone_says_which_command_makes_its_input(
    stage: Stage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["configs/debug.yaml", f"runs={tmp_path}", "tracking.enabled=false"]
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("sys.argv", ["cldf", stage.name, *words])
    assert main([stage.name, *words]) == 1
    command = f"cldf {stage.needs[0]} {' '.join(words)}"
    missing = tmp_path / "debug" / stage.needs[0]
    assert capsys.readouterr().err == f"cldf: error: {missing} is not finished; run: {command}\n"
    assert not list(tmp_path.iterdir()), "nothing is made in vain"


def test_dry_run_tells_everything_and_writes_nothing(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [debug_run.words[0], f"runs={tmp_path / 'runs'}"]
    assert main(["run", *words, "--dry-run", "cam.dropout=0.375"]) == 0
    said = capsys.readouterr().out
    assert "dropout: 0.375" in said
    for stage in STAGES:
        folder = tmp_path / "runs" / "debug" / stage.name
        assert f"{stage.name}: {stage.does}" in said
        assert f"output: {folder} (to do)" in said
        for need in stage.needs:
            assert f"input:  {folder.parent / need} (missing; made by: cldf {need}" in said
    assert "steps:  6 of 4 samples over all processes" in said
    assert "patients: 12" in said
    assert "MB per slice" in said
    assert len(re.findall(r"time: about \d+ (s|min|h) on this machine's", said)) == len(TRAININGS)
    assert not list(tmp_path.iterdir())


def test_dry_run_knows_what_is_finished(debug_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(debug_run.folder)
    assert main(["cache", *debug_run.words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"output: {debug_run.folder / 'cache'} (finished)" in said
    assert f"input:  {debug_run.folder / 'train-cam'} (finished)" in said
    assert snapshot(debug_run.folder) == before


def test_a_batch_that_does_not_divide_is_told_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        str(Path(__file__).parents[2] / "configs" / "debug.yaml"),
        f"runs={tmp_path}",
        "tracking.enabled=false",
        "decoder.fit.gradient_accumulation_steps=1",
    ]
    assert (
        main(["run", *words, "cam.fit.batch_size=5", "cam.fit.gradient_accumulation_steps=2"]) == 1
    )
    assert "cam.fit.batch_size (5, over all processes) must be a multiple of" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "debug").exists()


@pytest.mark.parametrize(
    ("stage", "first", "word", "told"),
    [
        ("prepare", "prepare", "data.image_size=48", "data.image_size=32, not 48"),
        ("cache", "cache", "seeds.object_threshold=0.6", "seeds.object_threshold=0.4, not 0.6"),
        ("evaluate", "segment", "cam.dropout=0.3", "cam.dropout=0.1, not 0.3"),
        ("train-decoder", "cache", "seed=5", "seed=0, not 5"),
        ("train-diffusion", "train-diffusion", "fit.steps=7", "diffusion.fit.steps=6, not 7"),
    ],
)
def test_a_changed_setting_of_a_finished_stage_is_refused(
    debug_run: Any, capsys: pytest.CaptureFixture[str], stage: str, first: str, word: str, told: str
) -> None:
    """`first` is the nearest stage before it that the setting concerns."""
    before = snapshot(debug_run.folder)
    assert main([stage, *debug_run.words, word]) == 1
    said = capsys.readouterr().err
    assert f"{debug_run.folder / first} was made with {told}; take another name=" in said
    assert snapshot(debug_run.folder) == before


def test_a_setting_of_a_later_stage_leaves_a_finished_one_valid(debug_run: Any) -> None:
    assert main(["cache", *debug_run.words, "segment.negative_fraction=0.2"]) == 0
    assert main(["train-cam", *debug_run.words, "diffusion.fit.steps=7"]) == 0


@pytest.mark.slow
def test_no_training_opens_a_mask(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every mask in the shards is damaged, so that reading one is an error."""
    run = debug_run.copy_to(tmp_path, "prepare")
    assert damage_masks(run.folder / "prepare") > 50
    with pytest.raises(DamagedShardError):
        ShardSet(run.folder / "prepare").split("train").read_mask(0)
    for stage in TRAININGS:
        assert main([stage, *run.words]) == 0
        net = f"{stage}/net.safetensors"
        assert (run.folder / net).read_bytes() == (debug_run.folder / net).read_bytes()
    shutil.copytree(debug_run.folder / "cache", run.folder / "cache")
    identity = run.folder / "cache" / "run.json"  # taken over from another run, knowingly
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "inputs": {}}))
    assert main(["train-decoder", *run.words, "evaluate.upper_bound=false"]) == 0
    for row in (".", CLDF_PLUS, PATCH_FEATURES):
        net = f"train-decoder/{row}/net.safetensors"
        assert (run.folder / net).read_bytes() == (debug_run.folder / net).read_bytes()
    assert not any((run.folder / "train-decoder" / row).exists() for row in UPPER_BOUNDS)
    shutil.rmtree(run.folder / "train-decoder")
    capsys.readouterr()
    assert main(["train-decoder", *run.words]) == 1, "the reference row is the one that does"
    assert "mask" in capsys.readouterr().err.splitlines()[-1]


def write_scan(folder: Path, index: int) -> tuple[tuple[int, ...], np.ndarray[Any, Any]]:
    """A phantom patient that the run has not seen, laid out like BraTS without a segmentation."""
    settings = PhantomSettings(num_patients=40, num_slices=5, grid_size=40)
    image, _, affine = phantom_patient(index, settings)
    folder.mkdir(parents=True)
    for number, channel in enumerate(CHANNELS):
        path = folder / f"{folder.name}_{channel}.nii.gz"
        write_nifti(path, image[number].astype(np.float32), affine)
    return image.shape[1:], affine


def test_new_scans_get_masks_in_their_own_geometry(
    debug_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {
        name: write_scan(tmp_path / "scans" / name, i) for i, name in ((30, "ann"), (31, "bob"))
    }
    before = snapshot(debug_run.folder)
    output = tmp_path / "masks"
    words = [*debug_run.words, f"input={tmp_path / 'scans'}", f"output={output}"]
    assert main(["segment", *words]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert paths == [str(output / "ann_mask.nii.gz"), str(output / "bob_mask.nii.gz")]
    for name, (shape, affine) in expected.items():
        for kind in ("mask", "probability"):
            values, found = read_nifti(output / f"{name}_{kind}.nii.gz")
            assert values.shape == shape
            np.testing.assert_allclose(found, affine, atol=1e-4)
            assert 0 <= values.min() <= values.max() <= 1
    assert snapshot(debug_run.folder) == before, "the run itself stays as it is"
    single = tmp_path / "single"
    words = [*debug_run.words, f"input={tmp_path / 'scans'}", f"output={tmp_path / 'no'}"]
    assert main(["segment", *words, "gradient_map.num_noise_samples=3"]) == 1
    assert (
        "was made with gradient_map.num_noise_samples=1, not 3; new scans"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "no").exists()
    words = [*debug_run.words, f"input={tmp_path / 'scans' / 'ann'}", f"output={single}"]
    assert main(["segment", *words]) == 0
    for path in single.iterdir():
        assert path.read_bytes() == (output / path.name).read_bytes()
    capsys.readouterr()


def test_new_scans_need_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(Path(__file__).parents[2] / "configs" / "debug.yaml"), f"runs={tmp_path}"]
    assert main(["segment", *words, f"input={tmp_path}", f"output={tmp_path / 'out'}"]) == 1
    assert "segment is not finished; run: cldf segment" in capsys.readouterr().err
