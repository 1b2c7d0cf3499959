import pytest
import torch
from torch.nn import functional

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


@pytest.mark.parametrize("size", [(12, 16), (24, 20)])
def test_embedding_maps_equals_embedding_upsampled_concatenated_pixels(size):
    net, taps = decoder(), maps()
    upsampled = [
        functional.interpolate(taps[name], size=size, mode="bilinear", align_corners=False)
        for name in TAPS
    ]
    pixels = torch.cat(upsampled, 1).movedim(1, -1).reshape(-1, 13)
    expected = net(pixels).reshape(2, *size, 5).movedim(-1, 1)
    torch.testing.assert_close(net.embed_maps(taps, size), expected, atol=2e-6, rtol=1e-5)


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
