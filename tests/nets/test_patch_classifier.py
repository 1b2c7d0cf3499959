"""The window of a pixel's evidence, and a slice's logit from it."""

import dataclasses

import pytest
import torch
from torch import Tensor

from cldf_dist.config import PatchClassifier as Settings
from cldf_dist.nets.patch_classifier import OUTSIDE, PatchClassifier, pooled_logit

SETTINGS = Settings(channels=8, layers=2, pooled_fraction=0.25)


def make_net(**changes: int | float) -> PatchClassifier:
    torch.manual_seed(0)
    return PatchClassifier(dataclasses.replace(SETTINGS, **changes), 3)


def slices(count: int = 2, height: int = 16, width: int = 16) -> Tensor:
    """Noise within [-0.9, 0.9] everywhere: all of it is subject."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, height, width, generator=generator) * 1.8 - 0.9


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_evidence_depends_on_two_layers_and_one_pixels_and_on_nothing_else(layers: int) -> None:
    net = make_net(layers=layers).double()  # float32 convolutions may mix tiles by round-off
    image = slices(1, 15, 17).double()
    changed = image.clone()
    changed[..., 7, 8] += 0.05
    with torch.no_grad():
        before, after = (
            net.patch_logits(net.activations(x), (15, 17))[0] for x in (image, changed)
        )
    window = torch.zeros(15, 17, dtype=torch.bool)
    window[7 - layers : 8 + layers, 8 - layers : 9 + layers] = True
    torch.testing.assert_close(before != after, window, rtol=0, atol=0)


def test_the_window_is_of_blocks_where_the_slice_is_made_smaller() -> None:
    net = make_net(layers=2, downsample=2).double()
    image = slices(1, 24, 24).double()
    changed = image.clone()
    changed[..., 12, 13] += 0.05  # in block (6, 6)
    with torch.no_grad():
        before, after = (net.activations(x) for x in (image, changed))
        maps = [net.patch_logits(activations, (24, 24))[0] for activations in (before, after)]
    blocks = torch.zeros(12, 12, dtype=torch.bool)
    blocks[4:9, 4:9] = True
    torch.testing.assert_close((before != after).any(1)[0], blocks, rtol=0, atol=0)
    rows, columns = torch.nonzero(maps[0] != maps[1], as_tuple=True)
    for places in (rows, columns):  # a pixel lies between two blocks
        assert (places.min(), places.max()) == (2 * 4 - 1, 2 * 8 + 2)


@pytest.mark.parametrize(
    ("inside", "share", "expected"),
    [
        ([1, 1, 1, 1], 0.5, (4 + 3) / 2),
        ([1, 1, 1, 1], 0.99, (4 + 3 + 2) / 3),  # never more than the share
        ([1, 1, 1, 1], 1.0, (4 + 1 + 3 + 2) / 4),
        ([0, 1, 1, 1], 0.67, (3 + 2) / 2),  # of the pixels inside: not the 4
        ([1, 1, 1, 1], 1e-6, 4.0),  # one at least
        ([0, 1, 0, 0], 1.0, 1.0),
        ([0, 0, 0, 0], 0.5, 0.0),  # nothing is inside
    ],
)
def test_pooled_logit_is_the_mean_of_the_highest_share(
    inside: list[int], share: float, expected: float
) -> None:
    logits = torch.tensor([[[4.0, 1.0], [3.0, 2.0]]])
    mask = torch.tensor(inside, dtype=torch.bool).reshape(1, 2, 2)
    assert pooled_logit(logits, mask, share).tolist() == pytest.approx([expected])


def test_each_map_of_a_batch_is_pooled_by_its_own_pixels() -> None:
    logits = torch.tensor([[[4.0, 1.0, 3.0, 2.0]], [[-4.0, -1.0, -3.0, -2.0]], [[9.0] * 4]])
    inside = torch.tensor([[[1, 1, 1, 1]], [[1, 0, 1, 0]], [[0, 0, 0, 0]]], dtype=torch.bool)
    assert pooled_logit(logits, inside, 0.5).tolist() == [3.5, -3.0, 0.0]


def test_ties_count_once_each_and_gradients_go_to_the_pooled_pixels_alone() -> None:
    logits = torch.tensor([[[2.0, 2.0, 2.0, 1.0]], [[5.0, 5.0, 5.0, 5.0]]], requires_grad=True)
    inside = torch.tensor([[[1, 1, 1, 1]], [[0, 0, 0, 0]]], dtype=torch.bool)
    pooled = pooled_logit(logits, inside, 0.5)
    assert pooled.tolist() == [2.0, 0.0]
    pooled.sum().backward()
    assert logits.grad is not None
    assert sorted(logits.grad[0, 0, :3].tolist()) == [0.0, 0.5, 0.5]
    assert logits.grad[0, 0, 3] == 0
    assert (logits.grad[1] == 0).all(), "a map without a subject teaches nothing, and no NaN"


def test_the_logits_are_opposite_and_their_difference_is_the_pooled_evidence() -> None:
    net, images = make_net(), slices()
    images[:, :, :6] = OUTSIDE
    logits = net(images)
    assert logits.shape == (2, 2)
    torch.testing.assert_close(logits[:, 0], -logits[:, 1], rtol=0, atol=0)
    patch_logits = net.patch_logits(net.activations(images), (16, 16))
    assert patch_logits.shape == (2, 16, 16)
    highest = patch_logits[:, 6:].flatten(1).sort(1, descending=True)[0][:, : 10 * 16 // 4]
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], highest.mean(1))


def test_a_block_is_inside_where_any_of_its_pixels_is() -> None:
    net, images = make_net(downsample=2, pooled_fraction=1.0), slices(1)
    images[:] = OUTSIDE
    images[0, 1, 5, 8] = 0.5  # one channel of one pixel
    logits = net.linear(net.activations(images))
    torch.testing.assert_close(net(images)[0].diff()[0], logits[0, 0, 2, 4])


def test_feature_scale_multiplies_whole_channels() -> None:
    net, images = make_net(), slices()
    torch.testing.assert_close(net(images, torch.ones(2, 8)), net(images))
    scale = torch.ones(2, 8)
    scale[0, 3] = 0
    found = net(images, scale)
    torch.testing.assert_close(found[1], net(images)[1])
    assert (found[0] - net(images)[0]).abs().max() > 1e-4
    with torch.no_grad():
        net.linear.weight[:, 3] = 0
    torch.testing.assert_close(found[0], net(images)[0])


@pytest.mark.parametrize("downsample", [1, 2])
def test_odd_sizes_have_evidence_for_every_pixel(downsample: int) -> None:
    net, images = make_net(downsample=downsample), slices(2, 17, 23)
    activations = net.activations(images)
    assert activations.shape == (2, 8, 17 // downsample, 23 // downsample)
    patch_logits = net.patch_logits(activations, (17, 23))
    assert patch_logits.shape == (2, 17, 23)
    assert patch_logits.dtype == torch.float32
    net(images).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_either_layout_gives_the_same() -> None:
    net, images = make_net(), slices()
    expected = net(images), net.patch_logits(net.activations(images), (16, 16))
    net = net.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    found = net(images), net.patch_logits(net.activations(images), (16, 16))
    torch.testing.assert_close(found, expected)


def test_a_slice_does_not_know_its_batch() -> None:
    net, images = make_net(), slices(3)
    torch.testing.assert_close(net(images)[:1], net(images[:1]))
