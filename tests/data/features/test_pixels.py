import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cldf_dist.data.features.pixel_labels import count_labels
from cldf_dist.data.features.pixels import (
    PixelsPerItem,
    SeedPixels,
    TrainingPixels,
    gather_pixels,
    interpolate_at,
    strongest_activation,
)
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.stream import Stream
from cldf_dist.inference.seed_sources import SeedLabels
from cldf_dist.system.seeding import sample_seed

TAPS = ("up0.1", "up1.1")
SIZE = 12
UNKNOWN, BACKGROUND, OBJECT = -1, 0, 1


SHAPES = {
    "up0.1": ((2, 3, 3, 5), "float16"),
    "up1.1": ((2, 6, 6, 4), "float16"),
    "cam": ((SIZE, SIZE), "float16"),
    "gradient_map": ((SIZE, SIZE), "float16"),
    "seeds": ((SIZE, SIZE), "int8"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """Six slices with two taps; the first channel of up1.1 is the slice's number."""
    folder = tmp_path_factory.mktemp("cache") / "features.zarr"
    cache = FeatureCache.create(folder, 6, SHAPES, slices_per_shard=2, attributes={})
    rng = np.random.default_rng(0)
    for shard in range(3):
        values = {name: rng.normal(size=(2, *shape)) for name, (shape, _) in SHAPES.items()}
        rows = cache.slices_of(shard)
        values["seeds"] = make_seeds()[rows.start : rows.stop]
        for place, row in enumerate(rows):
            values["up1.1"][place, ..., 0] = row
        cache.write_shard(shard, [f"slice_{row}" for row in rows], values)
    return cache


@dataclass
class LabelsInMemory:
    """Labels of all rows, which remembers what it was asked for."""

    seeds: npt.NDArray[np.int8]
    asked: list[int] = field(default_factory=list)

    def labels(self, row: int) -> npt.NDArray[np.int8]:
        self.asked.append(row)
        return self.seeds[row]


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
    cache: FeatureCache,
    rows: list[int],
    seeds: npt.NDArray[np.int8] | None = None,
    *,
    hard_negatives: float = 0.0,
    hard_pool: float = 0.1,
) -> SeedPixels:
    labels = LabelsInMemory(make_seeds() if seeds is None else seeds)
    listed = np.array(rows)
    pixels = TrainingPixels(cache, TAPS, labels, listed, count_labels(labels, listed))
    labels.asked.clear()
    return SeedPixels(pixels, PixelsPerItem(8, 10, hard_negatives, hard_pool), seed=3)


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
        ValueError, match=r"no training slice has an object seed; lower seeds\.object_threshold"
    ):
        make_items(cache, [3, 4])
    with pytest.raises(
        ValueError,
        match=r"no training slice has a background seed; raise seeds\.background_threshold",
    ):
        make_items(cache, [2])


def drawn_at_random(
    cache: FeatureCache, seeds: npt.NDArray[np.int8], position: int, number: int
) -> npt.NDArray[np.float32]:
    """Features of a sample, draw by draw from the whole array of seeds; all rows may be used."""
    has_object, has_background = ((seeds == label).any(axis=(1, 2)) for label in (OBJECT, 0))
    rng = np.random.default_rng(sample_seed(3, number, "seed pixels"))
    row = int(np.flatnonzero(has_object)[position])
    partner = int(rng.choice(np.flatnonzero(has_background & ~has_object)))
    here = 5 if has_background[row] else 0
    parts = []
    for source, label, count in (
        (row, OBJECT, 8),
        (row, BACKGROUND, here),
        (partner, 0, 10 - here),
    ):
        if count:
            candidates = np.flatnonzero(seeds[source] == label)
            chosen = rng.choice(candidates, count, replace=len(candidates) < count)
            places = np.stack(np.divmod(chosen, SIZE), axis=1)
            parts.append(gather_pixels(cache, TAPS, source, places, (SIZE, SIZE)))
    return np.concatenate(parts)


def test_without_hard_negatives_the_draws_are_those_of_plain_chance(cache: FeatureCache) -> None:
    """Bit by bit: a share of 0 changes no draw, and neither does the pool."""
    for pool in (0.1, 1.0):
        items = make_items(cache, [0, 1, 2, 3, 4, 5], hard_negatives=0.0, hard_pool=pool)
        for position in range(len(items)):
            for number in range(20):
                expected = drawn_at_random(cache, make_seeds(), position, number)
                assert np.array_equal(items.get(position, number)["features"].numpy(), expected)


def test_hard_negatives_are_the_background_most_like_the_object(cache: FeatureCache) -> None:
    """Six of ten, three of each slice, from the highest tenth; the others are different pixels."""
    seeds = make_seeds()
    items = make_items(cache, [0, 3], hard_negatives=0.6, hard_pool=0.1)
    hard_of = {}
    for row in (0, 3):
        activation = strongest_activation(cache, row, seeds[row])
        number = round(0.1 * np.count_nonzero(seeds[row] == BACKGROUND))
        lowest = np.sort(activation[seeds[row] == BACKGROUND])[-number]
        hard_of[row] = (activation >= lowest) & (seeds[row] == BACKGROUND)
        assert number <= hard_of[row].sum() < 2 * number
    drawn = set()
    for number in range(30):
        (row, places, size), (partner, others, _) = items.choose(0, number)
        assert (row, partner, len(places), len(others), size) == (0, 3, 13, 5, (SIZE, SIZE))
        assert all(seeds[0][tuple(place)] == OBJECT for place in places[:8])
        for source, chosen in ((row, places[8:]), (partner, others)):
            assert all(seeds[source][tuple(place)] == BACKGROUND for place in chosen)
            assert all(hard_of[source][tuple(place)] for place in chosen[:3])
            assert len(np.unique(chosen, axis=0)) == 5
            drawn |= {bool(hard_of[source][tuple(place)]) for place in chosen[3:]}
    assert drawn == {True, False}, "the others come from all of the background"


def test_hard_negatives_are_a_function_of_the_sample_number(cache: FeatureCache) -> None:
    first, second = (make_items(cache, [0, 1, 3, 4], hard_negatives=0.5) for _ in range(2))
    second.get(1, 9)
    assert torch.equal(first.get(0, 5)["features"], second.get(0, 5)["features"])
    assert not torch.equal(first.get(0, 5)["features"], first.get(0, 6)["features"])
    plain = make_items(cache, [0, 1, 3, 4])
    assert not torch.equal(first.get(0, 5)["features"], plain.get(0, 5)["features"])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_few_hard_pixels_are_drawn_again_and_the_numbers_stay(
    cache: FeatureCache, share: float
) -> None:
    seeds = make_seeds()
    seeds[4] = UNKNOWN
    seeds[4, 0, :3] = BACKGROUND
    activation = strongest_activation(cache, 4, seeds[4])[0, :3]
    hardest = np.flatnonzero(activation == activation.max())
    assert len(hardest) < 3
    items = make_items(cache, [0, 4], seeds, hard_negatives=share)
    item = items.get(0, 0)
    assert item["labels"].tolist() == [1] * 8 + [0] * 10
    (_, _, _), (partner, places, _) = items.choose(0, 0)
    num_hard = round(5 * share)
    assert (partner, len(places)) == (4, 5)
    assert set(places[:num_hard, 1]) <= set(hardest)
    assert set(places[:, 0]) == {0}


def test_maps_that_say_nothing_leave_the_draw_to_chance(tmp_path: Path) -> None:
    """All pixels of a constant map tie: the order of pixels does not decide."""
    cache = FeatureCache.create(tmp_path / "c", 2, SHAPES, slices_per_shard=2, attributes={})
    values = {name: np.zeros((2, *shape)) for name, (shape, _) in SHAPES.items()}
    cache.write_shard(0, ["a", "b"], values)
    seeds = make_seeds()[[0, 3]]
    assert not strongest_activation(cache, 1, seeds[1]).any()
    items = make_items(cache, [0, 1], seeds, hard_negatives=1.0, hard_pool=0.01)
    rows = {tuple(place) for number in range(60) for place in items.choose(0, number)[1][1]}
    assert len(rows) > 100


def test_activation_is_the_larger_of_both_maps_scaled_over_labelled_pixels(tmp_path: Path) -> None:
    shapes = {"cam": ((1, 4), "float16"), "gradient_map": ((1, 4), "float16")}
    cache = FeatureCache.create(tmp_path / "c", 1, shapes, slices_per_shard=1, attributes={})
    maps = {"cam": [[[2.0, 4.0, 3.0, 99.0]]], "gradient_map": [[[1.0, 0.0, 0.25, -50.0]]]}
    cache.write_shard(0, ["a"], {name: np.array(value) for name, value in maps.items()})
    labels = np.array([[BACKGROUND, OBJECT, BACKGROUND, UNKNOWN]], dtype=np.int8)
    assert strongest_activation(cache, 0, labels).tolist() == [[1.0, 1.0, 0.5, 0.0]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("hard_negatives", [0.0, 0.5])
def test_a_step_has_the_same_pixels_on_any_number_of_processes(
    cache: FeatureCache, world_size: int, hard_negatives: float
) -> None:
    items = make_items(cache, [0, 1, 2, 3, 4], hard_negatives=hard_negatives)
    stream = Stream(items, items.shard_of, seed=0)
    whole = next(stream.batches(8, batch_size=4))
    parts = [
        next(stream.batches(8, batch_size=4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    found = {name: torch.cat([part[name] for part in parts]) for name in whole}
    order = torch.argsort(found["sample_number"])
    assert all(torch.equal(found[name][order], whole[name]) for name in whole)
    assert [int((whole["labels"] == label).sum()) for label in (OBJECT, BACKGROUND)] == [32, 40]


def test_labels_are_read_for_the_slices_of_a_sample_alone(cache: FeatureCache) -> None:
    items = make_items(cache, [0, 1, 2, 3])
    source: Any = items.pixels.labels
    assert source.asked == []
    items.get(1, 0)
    assert source.asked == [1, 3]


def test_seeds_of_the_cache_are_read_in_place_and_travel_as_a_path(cache: FeatureCache) -> None:
    """In a loader's process the same samples come from the store, not from what was sent."""
    rows = np.arange(6)
    labels = SeedLabels(cache)
    assert np.array_equal(np.stack([labels.labels(row) for row in rows]), make_seeds())
    assert not labels.labels(0).flags.owndata
    counts = count_labels(labels, rows)
    assert counts.tolist() == [[72, 6], [16, 1], [0, 4], [144, 0], [48, 0], [0, 0]]
    pixels = TrainingPixels(cache, TAPS, labels, rows, counts)
    items = SeedPixels(pixels, PixelsPerItem(8, 10, 0.5, 0.1), seed=3)
    sent = pickle.dumps(items)
    assert len(sent) < 2000
    there = pickle.loads(sent)
    assert torch.equal(there.get(1, 4)["features"], items.get(1, 4)["features"])


def test_whole_numbers_are_scaled_after_they_were_interpolated(tmp_path: Path) -> None:
    shapes = {"up0.1": ((2, 3, 4, 5), "int8"), "up0.1.scale": ((2, 5), "float32")}
    cache = FeatureCache.create(tmp_path / "c", 1, shapes, slices_per_shard=1, attributes={})
    rng = np.random.default_rng(2)
    stored = rng.integers(-127, 128, (1, 2, 3, 4, 5))
    scale = rng.uniform(0.01, 1.0, (1, 2, 5)).astype(np.float32)
    cache.write_shard(0, ["a"], {"up0.1": stored, "up0.1.scale": scale})
    pixels = np.array([[0, 0], [11, 11], [5, 7]])
    whole = upsampled(stored[0] * scale[0][:, None, None], (SIZE, SIZE))
    gathered = gather_pixels(cache, ("up0.1",), 0, pixels, (SIZE, SIZE))
    assert gathered.dtype == np.float32
    np.testing.assert_allclose(gathered, whole[pixels[:, 0], pixels[:, 1]], rtol=1e-4, atol=1e-4)
