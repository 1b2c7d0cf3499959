import math

import pytest
import torch
from torch import Tensor

from cldf_dist.config import Augment
from cldf_dist.data.augment import augment
from cldf_dist.system.seeding import sample_seed

PINNED_SEED = 4675104600474231884
NOTHING = Augment(flip=False, rotate_degrees=0, scale=0, shift=0, intensity=0, probability=1)


def only(**changes: float) -> Augment:
    return Augment(**{**vars(NOTHING), **changes})


def disc(size: int = 64, radius: float = 12, column: float = 0) -> Tensor:
    """(2, size, size): a textured disc, `column` pixels right of the centre."""
    axis = torch.arange(size) - (size - 1) / 2
    inside = axis[:, None] ** 2 + (axis[None, :] - column) ** 2 < radius**2
    texture = torch.rand((2, size, size), generator=torch.Generator().manual_seed(0)) - 0.5
    return torch.where(inside, texture, torch.full_like(texture, -1))


def inside(image: Tensor) -> Tensor:
    return (image > -1).any(dim=0)


def centroid(image: Tensor) -> Tensor:
    return torch.nonzero(inside(image)).double().mean(dim=0)


def test_result_is_a_function_of_seed_and_sample_number() -> None:
    image = disc()
    first = augment(image, Augment(), 3, 41)
    torch.rand(100)
    assert torch.equal(augment(image, Augment(), 3, 41), first)
    assert not torch.equal(augment(image, Augment(probability=1), 3, 42), first)
    assert not torch.equal(augment(image, Augment(probability=1), 4, 41), first)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    augment(disc(), Augment(), 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_input_is_not_changed() -> None:
    image = disc()
    for number in range(20):
        augment(image, Augment(), 0, number)
    assert torch.equal(image, disc())


@pytest.mark.parametrize("number", range(12))
def test_subject_and_surroundings_stay_apart(number: int) -> None:
    image = disc()
    image[1][inside(image)] = -1 + 1e-4  # a channel that is as dark as can be
    changed = augment(image, Augment(rotate_degrees=30, intensity=0.5, probability=1), 0, number)
    outside = ~inside(changed)
    assert changed.dtype == torch.float32
    assert (changed[:, outside] == -1).all()
    assert (changed[:, ~outside] > -1).all()
    assert changed.max() <= 1
    assert not outside.all()


def test_nothing_happens_with_probability_zero_and_no_flip() -> None:
    for number in range(20):
        assert torch.equal(augment(disc(), Augment(flip=False, probability=0), 0, number), disc())


def test_probability_is_the_share_of_changed_samples() -> None:
    settings = Augment(flip=False, probability=0.8)
    changed = [not torch.equal(augment(disc(), settings, 0, n), disc()) for n in range(200)]
    assert 0.7 < sum(changed) / 200 < 0.9


def test_half_of_the_samples_are_flipped_left_to_right() -> None:
    image = disc(column=8)
    results = [augment(image, Augment(flip=True, probability=0), 0, n) for n in range(200)]
    flipped = [torch.equal(result, image.flip(-1)) for result in results]
    assert all(was or torch.equal(result, image) for was, result in zip(flipped, results))
    assert 0.4 < sum(flipped) / 200 < 0.6


def test_shift_is_a_share_of_the_image_size() -> None:
    shifts = torch.stack(
        [centroid(augment(disc(), only(shift=0.2), 0, n)) - centroid(disc()) for n in range(100)]
    )
    assert shifts.abs().max() < 0.2 * 64 + 0.5
    assert (shifts.amax(dim=0) > 0.15 * 64).all()
    assert (shifts.amin(dim=0) < -0.15 * 64).all()


def test_shift_does_not_depend_on_rotation_and_scale() -> None:
    for number in range(20):
        alone = centroid(augment(disc(), only(shift=0.2), 0, number))
        together = augment(disc(), only(shift=0.2, rotate_degrees=60, scale=0.2), 0, number)
        assert torch.allclose(centroid(together), alone, atol=0.5)


def test_scale_changes_the_size() -> None:
    area = float(inside(disc()).sum())
    ratios = [
        math.sqrt(float(inside(augment(disc(), only(scale=0.3), 0, n)).sum()) / area)
        for n in range(60)
    ]
    assert 0.68 < min(ratios) < 0.8
    assert 1.2 < max(ratios) < 1.32


def test_rotation_is_about_the_centre() -> None:
    image = disc(column=16, radius=6)
    centre = torch.full((2,), 31.5, dtype=torch.float64)
    angles = []
    for number in range(60):
        down, right = (
            centroid(augment(image, only(rotate_degrees=40), 0, number)) - centre
        ).tolist()
        assert math.hypot(down, right) == pytest.approx(16, abs=0.4)
        angles.append(math.degrees(math.atan2(down, right)))
    assert -42 < min(angles) < -30
    assert 30 < max(angles) < 42


def test_gain_is_drawn_for_each_channel() -> None:
    image = disc()
    changed = augment(image, only(intensity=0.05), 0, 1)
    ratio = ((changed + 1) / (image + 1))[:, inside(image)]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4)
    assert abs(float(ratio[0, 0] - ratio[1, 0])) > 1e-3
    assert torch.equal(inside(changed), inside(image))


def test_turning_one_change_off_leaves_the_others_as_they_were() -> None:
    image = disc(column=8)
    for number in range(10):
        with_flip = augment(image, Augment(flip=True, intensity=0), 0, number)
        without = augment(image.flip(-1), Augment(flip=False, intensity=0), 0, number)
        plain = augment(image, Augment(flip=False, intensity=0), 0, number)
        assert torch.equal(with_flip, without) or torch.equal(with_flip, plain)


def test_sample_seed_depends_on_all_its_arguments_and_nothing_else() -> None:
    assert sample_seed(0, 0, "augment") == PINNED_SEED
    seeds = {
        sample_seed(seed, number, purpose)
        for seed in range(5)
        for number in range(100)
        for purpose in ("augment", "noise")
    }
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
