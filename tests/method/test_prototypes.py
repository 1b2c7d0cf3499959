import pytest
import torch
from torch.nn import functional

from cldf_dist.method.prototypes import class_prototypes, prototype_score, spherical_k_means


def test_prototypes_are_the_mean_directions_by_hand():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]])
    prototypes = class_prototypes(embeddings, torch.tensor([1, 1, 0, -1]))
    root = 0.5**0.5
    torch.testing.assert_close(prototypes, torch.tensor([[0.0, -1.0], [root, root]]))


def test_unknown_pixels_do_not_count():
    torch.manual_seed(0)
    embeddings = functional.normalize(torch.randn(30, 4), dim=1)
    labels = torch.arange(30) % 3 - 1
    kept = labels >= 0
    torch.testing.assert_close(
        class_prototypes(embeddings, labels), class_prototypes(embeddings[kept], labels[kept])
    )


def test_score_is_one_at_the_object_and_zero_at_an_opposite_background():
    prototypes = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    embeddings = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]])
    assert prototype_score(embeddings, prototypes).tolist() == [[1.0, 0.0, 0.5]]


def test_score_stays_in_the_unit_interval_and_orders_by_nearness():
    torch.manual_seed(0)
    prototypes = functional.normalize(torch.randn(2, 8), dim=1)
    embeddings = functional.normalize(torch.randn(500, 8), dim=1)
    score = prototype_score(embeddings, prototypes)
    assert score.min() >= 0
    assert score.max() <= 1
    distances = torch.cdist(embeddings, prototypes)
    assert torch.equal(score > 0.5, distances[:, 1] < distances[:, 0])


@pytest.mark.parametrize(("label", "name"), [(0, "object"), (1, "background")])
def test_a_class_without_pixels_is_an_error_that_names_it(label, name):
    with pytest.raises(ValueError, match=f"no {name} pixel among 5 seeds"):
        class_prototypes(torch.randn(5, 3), torch.full((5,), label))


def three_bundles() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors around three axes, and the number of the axis of each."""
    torch.manual_seed(0)
    axes = torch.arange(90) % 3
    points = torch.eye(4, dtype=torch.float64)[axes] + 0.1 * torch.randn(90, 4).double()
    return functional.normalize(points, dim=1), axes


def test_k_means_finds_the_mean_direction_of_each_bundle() -> None:
    points, axes = three_bundles()
    centres = spherical_k_means(points, 3, seed=0)
    means = torch.stack([points[axes == axis].mean(0) for axis in range(3)])
    expected = functional.normalize(means, dim=1)
    nearest = (expected @ centres.T).argmax(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    torch.testing.assert_close(centres[nearest], expected)
    torch.testing.assert_close(spherical_k_means(points, 3, seed=0), centres, rtol=0, atol=0)


def test_as_many_centres_as_points_are_the_points() -> None:
    points, _ = three_bundles()
    centres = spherical_k_means(points[:5], 5, seed=1)
    nearest = (points[:5] @ centres.T).argmax(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(centres[nearest], points[:5])


def test_the_nearest_prototype_of_each_class_counts() -> None:
    points, axes = three_bundles()
    labels = (axes == 0).long()  # background in two bundles, whose mean lies between them
    prototypes = class_prototypes(points, labels, 2)
    assert prototypes.shape == (4, 4)
    score = prototype_score(points, prototypes)
    assert torch.equal(score > 0.5, labels == 1)
    cosines = points @ prototypes.T
    difference = cosines[:, 2:].max(1).values - cosines[:, :2].max(1).values
    torch.testing.assert_close(score, (difference / 2 + 1) / 2)
    with pytest.raises(ValueError, match="prototypes_per_class=31 needs as many object seeds"):
        class_prototypes(points, labels, 31)


def test_one_prototype_scores_as_before() -> None:
    points, axes = three_bundles()
    prototypes = class_prototypes(points, (axes == 0).long(), 1)
    one = prototype_score(points, prototypes)
    several = prototype_score(points, prototypes.repeat_interleave(2, 0))
    torch.testing.assert_close(one, several)
