import numpy as np
import torch

from cldf_dist.method.agreement import correlations

GENERATOR = torch.Generator().manual_seed(0)
MAPS = torch.randn(3, 7, 5, generator=GENERATOR)
OTHERS = MAPS + torch.randn(3, 7, 5, generator=GENERATOR)
INSIDE = torch.rand(3, 7, 5, generator=GENERATOR) > 0.4


def test_correlations_are_numpys_over_the_subject():
    for number, found in enumerate(correlations(MAPS, OTHERS, INSIDE).tolist()):
        inside = INSIDE[number]
        one, other = MAPS[number][inside].numpy(), OTHERS[number][inside].numpy()
        np.testing.assert_allclose(found, np.corrcoef(one, other)[0, 1], rtol=1e-6)


def test_scale_and_what_lies_outside_the_subject_do_not_matter():
    elsewhere = torch.where(INSIDE, 3 * OTHERS + 5, torch.full_like(OTHERS, 1e3))
    torch.testing.assert_close(
        correlations(MAPS, elsewhere, INSIDE), correlations(MAPS, OTHERS, INSIDE)
    )
    torch.testing.assert_close(
        correlations(MAPS, -MAPS, INSIDE), torch.full((3,), -1.0, dtype=torch.float64)
    )
    infinite = MAPS.masked_fill(~INSIDE, -torch.inf)
    assert correlations(infinite, OTHERS, INSIDE).isfinite().all()


def test_a_constant_map_agrees_with_nothing_and_an_empty_slice_says_nothing():
    inside = INSIDE.clone()
    inside[1] = False
    found = correlations(torch.full_like(MAPS, 2.0), OTHERS, inside)
    assert found[0] == found[2] == 0
    assert found[1].isnan()
