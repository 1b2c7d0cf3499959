import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cldf_dist.nets.decoder import PixelDecoder

TAPS = {"up0.1": 6, "up1.1": 4, "up2.1": 3}


def decoder() -> PixelDecoder:
    torch.manual_seed(0)
    net = PixelDecoder(TAPS, hidden=8, embedding=5, dropout=0.5, noise=0.5)
    net.standardise(torch.randn(13), torch.rand(13) + 0.5)
    return net.eval()


def maps() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    sizes = {"up0.1": (3, 4), "up1.1": (6, 8), "up2.1": (12, 16)}
    return {name: torch.randn(2, TAPS[name], *size) for name, size in sizes.items()}


SIDES = st.integers(1, 13)


@st.composite
def dense_cases(draw: st.DrawFn) -> tuple[PixelDecoder, dict[str, torch.Tensor], tuple[int, int]]:
    """A decoder, taps at any sizes (larger than the slice too), and the size of the slice."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    num_slices = draw(st.integers(1, 4))
    channels = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    taps = {
        f"up{number}.1": torch.randn(num_slices, count, draw(SIDES), draw(SIDES)) * 3
        for number, count in enumerate(channels)
    }
    net = PixelDecoder(
        {name: tap.shape[1] for name, tap in taps.items()}, draw(st.integers(1, 8)), 5
    )
    net.standardise(torch.randn(sum(channels)), torch.rand(sum(channels)) + 0.5)
    return net.double().eval(), taps, (draw(SIDES), draw(SIDES))


def naive_embedding(
    net: PixelDecoder, taps: dict[str, torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    """Upsample, concatenate, project, in the net's own precision: (batch, *size, embedding)."""
    dtype = net.first.weight.dtype
    upsampled = [
        functional.interpolate(taps[name].to(dtype), size=size, mode="bilinear")
        for name in net.tap_channels
    ]
    x = (torch.cat(upsampled, 1).movedim(1, -1) - net.mean) / net.std
    return functional.normalize(net.rest(net.first(x)), dim=-1)


@settings(max_examples=60, deadline=None)
@given(case=dense_cases())
def test_embedding_maps_equals_embedding_upsampled_concatenated_pixels(case):
    """Within float32's round-off of the float64 result, for any sizes of taps and slices."""
    net, taps, size = case
    expected = naive_embedding(net, taps, size).float()
    found = net.float().embed_maps(taps, size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.movedim(1, -1), expected, atol=2e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(case=dense_cases(), tile_pixels=st.integers(1, 200))
def test_tiles_cover_every_pixel_once_and_have_no_seams(case, tile_pixels):
    net, taps, size = case
    net = net.float()
    whole = net.embed_maps(taps, size).movedim(1, -1)
    joined, visits = torch.zeros_like(whole), torch.zeros(whole.shape[:3])
    for place, embedding in net.embed_tiles(taps, size, tile_pixels=tile_pixels):
        assert embedding.shape[:3].numel() <= tile_pixels
        joined[place] = embedding
        visits[place] += 1
    assert (visits == 1).all()
    torch.testing.assert_close(joined, whole, atol=2e-6, rtol=1e-5)


def test_debug_sized_maps_by_the_decoder_itself():
    """The oracle above against `forward`, which a pixel of the training goes through."""
    net, taps = decoder(), maps()
    pixels = torch.cat(
        [functional.interpolate(taps[name], size=(24, 20), mode="bilinear") for name in TAPS], 1
    )
    expected = net(pixels.movedim(1, -1).reshape(-1, 13)).reshape(2, 24, 20, 5)
    torch.testing.assert_close(naive_embedding(net, taps, (24, 20)), expected)


class LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned while the block ran."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.num_elements = max(self.num_elements, part.untyped_storage().nbytes() // 4)
        return result


def test_no_tensor_is_larger_than_a_tile():
    """Of a batch of large slices; the taps are small, so that the tiles decide."""
    net = PixelDecoder({"up0.1": 2, "up1.1": 3}, hidden=16, embedding=5)
    taps = {"up0.1": torch.randn(6, 2, 4, 4), "up1.1": torch.randn(6, 3, 8, 8)}
    with torch.no_grad(), LargestResult() as whole:
        net.embed_maps(taps, (64, 64))
    assert whole.num_elements == 6 * 64 * 64 * 16
    with torch.no_grad(), LargestResult() as tiled:
        for _ in net.embed_tiles(taps, (64, 64), tile_pixels=512):
            pass
    assert tiled.num_elements == 512 * 16


def test_whole_maps_pass_the_gradients_of_the_naive_order():
    net, taps = decoder(), maps()
    leaves = [*net.parameters(), *(tap.requires_grad_() for tap in taps.values())]
    weights = torch.randn(2, 12, 16, 5)
    expected = torch.autograd.grad((naive_embedding(net, taps, (12, 16)) * weights).sum(), leaves)
    found = net.embed_maps(taps, (12, 16)).movedim(1, -1)
    for mine, theirs in zip(torch.autograd.grad((found * weights).sum(), leaves), expected):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_a_tile_of_no_pixel_is_refused():
    with pytest.raises(ValueError, match="tile_pixels must be >= 1, got 0"):
        next(decoder().embed_tiles(maps(), (12, 16), tile_pixels=0))


def test_taps_are_found_by_name_not_by_their_order_in_the_call():
    net, taps = decoder(), maps()
    reordered = {name: taps[name] for name in reversed(taps)}
    assert torch.equal(net.embed_maps(reordered, (12, 16)), net.embed_maps(taps, (12, 16)))


def test_embeddings_have_unit_length():
    lengths = decoder()(torch.randn(50, 13) * 10).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(50))


def test_half_precision_features_are_embedded_in_single_precision():
    taps = {name: tensor.half() for name, tensor in maps().items()}
    assert decoder().embed_maps(taps, (12, 16)).dtype == torch.float32


def test_perturbation_acts_on_the_standardised_features():
    net = decoder()
    features = torch.randn(7, 13)
    at_mean = net(net.mean.expand(7, 13))
    torch.testing.assert_close(net(features, scale=torch.zeros(7, 13)), at_mean)
    shifted = net(features + 2 * net.std)
    torch.testing.assert_close(net(features, shift=torch.full((7, 13), 2.0)), shifted)


def test_statistics_travel_with_the_weights():
    net, other = decoder(), PixelDecoder(TAPS, hidden=8, embedding=5)
    other.load_state_dict(net.state_dict())
    features = torch.randn(4, 13)
    assert torch.equal(net(features), other(features))


def test_a_constant_feature_does_not_divide_by_zero():
    net = decoder()
    net.standardise(torch.zeros(13), torch.zeros(13))
    assert net(torch.randn(3, 13)).isfinite().all()


def test_statistics_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="must have 13 entries"):
        decoder().standardise(torch.zeros(12), torch.ones(12))
