from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cldf_dist.data.cache import FeatureCache
from cldf_dist.data.pixels import SeedPixels, gather_pixels, interpolate_at

TAPS = ("up0.1", "up1.1")
SIZE = 12
UNKNOWN, BACKGROUND, OBJECT = -1, 0, 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """Six slices with two taps; the first channel of up1.1 is the slice's number."""
    shapes = {"up0.1": ((2, 3, 3, 5), "float16"), "up1.1": ((2, 6, 6, 4), "float16")}
    folder = tmp_path_factory.mktemp("cache") / "features.zarr"
    cache = FeatureCache.create(folder, 6, shapes, slices_per_shard=2, attributes={})
    rng = np.random.default_rng(0)
    for shard in range(3):
        values = {name: rng.normal(size=(2, *shape)) for name, (shape, _) in shapes.items()}
        for place, row in enumerate(cache.rows_of(shard)):
            values["up1.1"][place, ..., 0] = row
        cache.write_shard(shard, [f"slice_{row}" for row in cache.rows_of(shard)], values)
    return cache


def upsampled(stored: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """(levels, h, w, channels) -> (height, width, levels x channels), by torch."""
    maps = torch.from_numpy(stored.astype(np.float32)).permute(0, 3, 1, 2)
    large = torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    return large.flatten(0, 1).permute(1, 2, 0).numpy()


def make_seeds() -> npt.NDArray[np.int8]:
    """0 and 1: object and background; 2: object alone; 3 and 4: background alone; 5: nothing."""
    seeds = np.full((6, SIZE, SIZE), UNKNOWN, dtype=np.int8)
    seeds[0, :2, :3] = OBJECT
    seeds[0, 6:, :] = BACKGROUND
    seeds[1, 5, 5] = OBJECT
    seeds[1, 8:, 8:] = BACKGROUND
    seeds[2, 3:5, 3:5] = OBJECT
    seeds[3] = BACKGROUND
    seeds[4, :4] = BACKGROUND
    return seeds


def make_items(
    cache: FeatureCache, rows: list[int], seeds: npt.NDArray[np.int8] | None = None
) -> SeedPixels:
    return SeedPixels(
        cache,
        TAPS,
        rows=np.array(rows),
        seeds=make_seeds() if seeds is None else seeds,
        num_foreground=8,
        num_background=10,
        seed=3,
    )


def slice_numbers(item: dict[str, Any]) -> list[int]:
    """Which slice each pixel came from: the first channel of up1.1, at its first noise level."""
    return [int(number) for number in item["features"][:, 10].round()]


@pytest.mark.parametrize("stored", [(1, 1), (3, 3), (4, 6), (12, 9)])
@pytest.mark.parametrize("size", [(12, 9), (16, 24)])
def test_interpolation_equals_upsampling_the_whole_map(
    stored: tuple[int, int], size: tuple[int, int]
) -> None:
    maps = np.random.default_rng(1).normal(size=(2, *stored, 3)).astype(np.float32)
    pixels = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1).reshape(-1, 2)
    expected = upsampled(maps, size).reshape(-1, 6)
    np.testing.assert_allclose(interpolate_at(maps, pixels, size), expected, rtol=1e-4, atol=1e-5)


def test_interpolation_by_hand() -> None:
    maps = np.array([0.0, 4.0]).reshape(1, 1, 2, 1)
    pixels = np.array([[0, 0], [0, 1], [0, 2], [0, 3]])
    # half-pixel centres: the four pixels lie at -1/4, 1/4, 3/4 and 5/4 of the stored grid
    assert interpolate_at(maps, pixels, (1, 4)).ravel().tolist() == [0, 1, 3, 4]


def test_gathered_features_are_the_upsampled_ones_of_all_taps(cache: FeatureCache) -> None:
    pixels = np.array([[0, 0], [11, 11], [5, 7], [3, 0]])
    whole = np.concatenate([upsampled(cache.read(tap, 2), (SIZE, SIZE)) for tap in TAPS], axis=2)
    gathered = gather_pixels(cache, TAPS, 2, pixels, (SIZE, SIZE))
    assert gathered.dtype == np.float32
    assert gathered.shape == (4, 18)
    np.testing.assert_allclose(gathered, whole[pixels[:, 0], pixels[:, 1]], rtol=1e-4, atol=1e-4)


def test_items_have_fixed_numbers_of_object_and_background_pixels(cache: FeatureCache) -> None:
    items = make_items(cache, [0, 1, 2, 3, 4, 5])
    assert len(items) == 3
    assert items.shard_of.tolist() == [0, 0, 1]
    for position in range(3):
        for number in range(5):
            item = items.get(position, number)
            assert item["features"].shape == (18, 18)
            assert item["features"].dtype == torch.float32
            assert item["labels"].tolist() == [1] * 8 + [0] * 10
            assert item["sample_number"] == number


def test_labels_are_those_of_the_seeds(cache: FeatureCache) -> None:
    """Each pixel's features are found among the upsampled features of seeds of its label."""
    seeds = make_seeds()
    items = make_items(cache, [0, 1, 2, 3, 4])
    whole = {
        row: np.concatenate([upsampled(cache.read(tap, row), (SIZE, SIZE)) for tap in TAPS], axis=2)
        for row in range(5)
    }
    for position in range(3):
        item = items.get(position, 7)
        for features, label, row in zip(item["features"], item["labels"], slice_numbers(item)):
            distance = np.abs(whole[row] - features.numpy()).max(axis=2)
            places = np.argwhere(distance < 1e-3)
            assert len(places)
            assert all(seeds[row][tuple(place)] == int(label) for place in places)


def test_half_of_the_background_comes_from_a_negative_slice(cache: FeatureCache) -> None:
    items = make_items(cache, [0, 1, 2, 3, 4])
    partners = set()
    for number in range(8):
        origin = slice_numbers(items.get(0, number))
        assert origin[:13] == [0] * 13
        assert len(set(origin[13:])) == 1
        partners.add(origin[13])
    assert partners == {3, 4}


def test_a_positive_slice_without_background_takes_it_all_from_the_partner(
    cache: FeatureCache,
) -> None:
    origin = slice_numbers(make_items(cache, [2, 3]).get(0, 0))
    assert origin == [2] * 8 + [3] * 10


def test_without_negative_slices_the_positive_one_gives_all_background(cache: FeatureCache) -> None:
    items = make_items(cache, [0, 1])
    assert len(items.negative) == 0
    assert slice_numbers(items.get(1, 0)) == [1] * 18


def test_without_negative_slices_a_positive_one_without_background_borrows_it(
    cache: FeatureCache,
) -> None:
    items = make_items(cache, [0, 2])
    position = items.positive.tolist().index(2)
    for number in range(4):
        item = items.get(position, number)
        assert item["labels"].tolist() == [1] * 8 + [0] * 10
        assert slice_numbers(item) == [2] * 8 + [0] * 10


def test_few_seeds_are_drawn_again_and_many_are_not(cache: FeatureCache) -> None:
    item = make_items(cache, [1, 3]).get(0, 0)
    assert len(np.unique(item["features"][:8].numpy(), axis=0)) == 1, "slice 1 has one object seed"
    assert len(np.unique(item["features"][13:].numpy(), axis=0)) == 5


def test_a_sample_is_a_function_of_its_number(cache: FeatureCache) -> None:
    first, second = make_items(cache, [0, 1, 3, 4]), make_items(cache, [0, 1, 3, 4])
    second.get(1, 9)  # what was drawn before does not matter
    assert torch.equal(first.get(0, 5)["features"], second.get(0, 5)["features"])
    assert not torch.equal(first.get(0, 5)["features"], first.get(0, 6)["features"])


def test_slices_that_are_not_listed_are_never_used(cache: FeatureCache) -> None:
    items = make_items(cache, [0, 3])
    origins = {origin for number in range(10) for origin in slice_numbers(items.get(0, number))}
    assert origins == {0, 3}


def test_seeds_of_one_class_only_are_refused_with_the_remedy(cache: FeatureCache) -> None:
    with pytest.raises(
        ValueError, match=r"no training slice has an object seed; lower seeds\.foreground"
    ):
        make_items(cache, [3, 4])
    with pytest.raises(
        ValueError, match=r"no training slice has a background seed; raise seeds\.background"
    ):
        make_items(cache, [2])
