import pytest
import torch
from torch.nn import functional

from cldf_dist.method.prototypes import class_prototypes, prototype_score


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
