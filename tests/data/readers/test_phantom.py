"""The promises of the synthetic scans: what they contain, and that they never change unnoticed.

`python tests/data/readers/test_phantom.py` prints the reference, stored in phantom_reference.json.
"""

import hashlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cldf_dist.data.readers.phantom import CHANNELS, PhantomSettings, phantom_patient

REPOSITORY = Path(__file__).parents[3]
REFERENCE = Path(__file__).with_name("phantom_reference.json")
MIN_OBJECT_PIXELS = 10
NUM_CHECKED = 12  # the tests of content look at this many patients

Scan = tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8], npt.NDArray[np.float64]]


@lru_cache(maxsize=1)
def default_scans() -> list[Scan]:
    settings = PhantomSettings()
    return [phantom_patient(index, settings) for index in range(settings.num_patients)]


def describe(scans: list[Scan]) -> dict[str, Any]:
    """The digest of the set, and per patient what a last-bit difference hardly moves."""
    digest = hashlib.sha256()
    for image, mask, _ in scans:
        digest.update(image.astype("<i2").tobytes() + mask.tobytes())
    return {
        "sha256": digest.hexdigest(),
        "object_voxels": [int((mask > 0).sum()) for _, mask, _ in scans],
        "channel_means": [np.round(i.mean((1, 2, 3)), 3).tolist() for i, _, _ in scans],
    }


def positive_slices(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    return np.asarray((mask > 0).sum((0, 1)) >= MIN_OBJECT_PIXELS)


def test_default_set_is_the_pinned_one() -> None:
    reference, found = json.loads(REFERENCE.read_text()), describe(default_scans())
    np.testing.assert_allclose(
        found["object_voxels"], reference["object_voxels"], rtol=0.01, atol=5
    )
    np.testing.assert_allclose(found["channel_means"], reference["channel_means"], rtol=0.005)
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    if all(f"{name}=={version(name)}" in pins for name in ("numpy", "scipy")):
        assert found["sha256"] == reference["sha256"]


def test_patient_depends_on_seed_and_index_alone() -> None:
    image, mask, _ = default_scans()[3]
    alone = phantom_patient(3, PhantomSettings(num_patients=4))
    assert np.array_equal(image, alone[0])
    assert np.array_equal(mask, alone[1])
    assert not np.array_equal(image, default_scans()[4][0])
    assert not np.array_equal(image, phantom_patient(3, PhantomSettings(seed=1))[0])


def test_shapes_types_and_range() -> None:
    image, mask, affine = default_scans()[0]
    assert image.shape == (len(CHANNELS), 64, 64, 24)
    assert mask.shape == (64, 64, 24)
    assert [a.dtype.name for a in (image, mask, affine)] == ["int16", "uint8", "float64"]
    assert image.min() >= 0
    assert 500 < image.max() < 3000


@pytest.mark.parametrize(("num_slices", "grid_size"), [(4, 16), (9, 33)])
def test_every_grid_shows_the_same_field_of_view(num_slices: int, grid_size: int) -> None:
    settings = PhantomSettings(num_slices=num_slices, grid_size=grid_size)
    image, mask, _ = phantom_patient(0, settings)
    assert image.shape[1:] == mask.shape == settings.shape == (grid_size, grid_size, num_slices)
    assert np.multiply(settings.spacing, settings.shape) == pytest.approx((192, 192, 108))


def test_affine_says_left_posterior_superior_and_is_centred() -> None:
    settings = PhantomSettings()
    affine = default_scans()[0][2]
    # one voxel further along each axis, in mm towards the patient's right, front and head
    assert np.allclose(affine[:3, :3], np.diag([-3.0, -3.0, 4.5]))
    middle = [(size - 1) / 2 for size in settings.shape]
    assert np.allclose(affine @ [*middle, 1.0], [0, 0, 0, 1])


def test_top_slices_are_smaller_than_middle_ones() -> None:
    for image, _, _ in default_scans()[:NUM_CHECKED]:
        bright = image[1] > 0.25 * np.percentile(image[1], 99)
        assert bright[:, :, -2].sum() < 0.8 * bright[:, :, 8].sum()


def test_objects_are_in_about_half_of_the_slices_and_in_most_patients() -> None:
    masks = [mask for _, mask, _ in default_scans()]
    positive = np.stack([positive_slices(mask) for mask in masks])
    assert 0.35 <= positive.mean() <= 0.60
    assert 0.75 <= positive.any(1).mean() < 1
    areas = np.concatenate([(mask > 0).sum((0, 1))[positive_slices(mask)] for mask in masks])
    assert 60 <= np.median(areas) <= 150


def test_last_patients_can_serve_as_test_set() -> None:
    """At least 12 unseen patients, and objects of all three compartments among them."""
    masks = [mask for _, mask, _ in default_scans()[30:]]
    assert sum(mask.any() for mask in masks) >= 12
    assert set(np.unique(np.stack(masks))) == {0, 1, 2, 4}


def test_object_is_inside_the_head() -> None:
    for image, mask, _ in default_scans():
        air = image.max(0) < 0.1 * np.percentile(image, 99)
        assert air[mask > 0].sum() <= 0.001 * mask.size


def test_slices_without_object_have_pixels_as_bright_as_objects() -> None:
    """In FLAIR and in contrast-enhanced T1, well inside the head."""
    for channel in (CHANNELS.index("flair"), CHANNELS.index("t1ce")):
        confounded = []
        for image, mask, _ in default_scans()[:NUM_CHECKED]:
            positive = positive_slices(mask)
            inside = image[channel, 18:46, 18:46, :18]
            empty = inside[:, :, ~positive[:18]]
            if positive.any() and empty.size:
                typical = np.median(image[channel][mask > 0])
                confounded.append(np.percentile(empty, 99.5) >= typical)
        assert len(confounded) >= NUM_CHECKED // 2
        assert np.mean(confounded) >= 0.5


def test_air_noise_is_rician() -> None:
    """Magnitudes of noise alone follow Rayleigh's law: mean / deviation = 1.91 at signal 0."""
    image = default_scans()[0][0].astype(np.float64)
    corner = image[0, :6, :6]
    assert 1.85 < corner.mean() / corner.std() < 3.0


def test_settings_out_of_range_say_so() -> None:
    with pytest.raises(ValueError, match=r"grid_size must be >= 16, got 8"):
        PhantomSettings(grid_size=8)
    with pytest.raises(ValueError, match=r"index must be in \[0, 44\), got 44"):
        phantom_patient(44, PhantomSettings())


def test_difficulty_check_runs(tmp_path: Path) -> None:
    output = tmp_path / "check.csv"
    command = [sys.executable, "benchmarks/phantom_check.py", "--tiny", "--output", str(output)]
    subprocess.run(command, cwd=REPOSITORY, check=True, env=_environment(), timeout=120)
    header, *rows = output.read_text().splitlines()
    assert header == "date,commit,seed,measure,value,seconds,versions"
    measures = {row.split(",")[3] for row in rows}
    assert {"threshold_best", "supervised_unet"} <= measures


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    json.dump(describe(default_scans()), sys.stdout, indent=1)
