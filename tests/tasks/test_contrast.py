from pathlib import Path

import numpy as np
import pytest
import torch
from cldf_kernels import supcon_loss, supcon_reference
from torch import Tensor, distributed, multiprocessing

from cldf_dist.data.features.pixel_labels import count_labels
from cldf_dist.data.features.pixels import PixelsPerItem, SeedPixels, TrainingPixels
from cldf_dist.data.features.store import FeatureCache
from cldf_dist.data.stream import Stream
from cldf_dist.inference.seed_sources import SeedLabels
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.system.process_end import end_process
from cldf_dist.tasks.contrast import Contrast, CrossEntropy

Kind = type[Contrast] | type[CrossEntropy]


def decoder(dropout: float = 0.0, noise: float = 0.0) -> PixelDecoder:
    torch.manual_seed(0)
    return PixelDecoder({"up0.1": 5, "up1.1": 4}, 8, 6, dropout, noise)


def batch(num_samples: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "features": torch.randn(num_samples, 10, 9, generator=generator),
        "labels": torch.randint(-1, 2, (num_samples, 10), generator=generator),
        "sample_number": torch.arange(num_samples) + 100,
    }


def class_similarity(net: PixelDecoder, data: dict[str, Tensor]) -> float:
    """Cosine between the mean embeddings of background and object."""
    embeddings = net(data["features"])
    background, objects = (embeddings[data["labels"] == index].mean(0) for index in (0, 1))
    return torch.cosine_similarity(background, objects, dim=0).item()


def part(data: dict[str, Tensor], chosen: slice) -> dict[str, Tensor]:
    return {name: tensor[chosen] for name, tensor in data.items()}


def test_loss_is_that_of_all_pixels_of_the_batch():
    net, data = decoder(), batch()
    loss = Contrast(net, temperature=0.2)(data)["loss"]
    embeddings = net(data["features"]).flatten(0, 1)
    expected = supcon_reference(embeddings, data["labels"].flatten(), temperature=0.2)
    torch.testing.assert_close(loss, expected)


def test_cross_entropy_by_hand() -> None:
    net, data = decoder(), batch()
    task = CrossEntropy(net, temperature=0.2, seed=0)
    losses = []
    for embedding, label in zip(net(data["features"]).flatten(0, 1), data["labels"].flatten()):
        if label >= 0:
            unit = task.directions / task.directions.norm(dim=1, keepdim=True)
            cosines = unit @ embedding
            losses.append((cosines / 0.2).logsumexp(0) - cosines[label] / 0.2)
    torch.testing.assert_close(task(data)["loss"], torch.stack(losses).mean())


@pytest.mark.parametrize("kind", [Contrast, CrossEntropy])
def test_unused_pixels_change_nothing(kind: Kind) -> None:
    data = batch()
    other = {name: tensor.clone() for name, tensor in data.items()}
    other["features"][data["labels"] < 0] = 1e3
    task = kind(decoder(dropout=0.5, noise=0.5), temperature=0.1, seed=0)
    assert torch.equal(task(data)["loss"], task(other)["loss"])


def test_perturbation_is_a_function_of_the_sample_and_ends_with_training():
    task, plain = Contrast(decoder(0.5, 0.5), temperature=0.1), Contrast(decoder(), temperature=0.1)
    first = task(batch())["loss"]
    torch.manual_seed(99)
    assert torch.equal(task(batch())["loss"], first)
    later = batch() | {"sample_number": torch.arange(4) + 200}
    assert not torch.equal(task(later)["loss"], first)
    other_seed = Contrast(decoder(0.5, 0.5), temperature=0.1, seed=1)
    assert not torch.equal(other_seed(batch())["loss"], first)
    assert torch.equal(task.eval()(batch())["loss"], plain(batch())["loss"])


@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_and_noise_each_act_alone(rates):
    perturbed, plain = Contrast(decoder(*rates), temperature=0.1), decoder()
    plain_loss = Contrast(plain, temperature=0.1)(batch())["loss"]
    assert (perturbed(batch())["loss"] - plain_loss).abs() > 1e-3


@pytest.mark.parametrize("kind", [Contrast, CrossEntropy])
def test_training_separates_the_classes(kind: Kind) -> None:
    data = batch()
    data["features"][..., :3] += 2.0 * (2 * data["labels"].clamp(min=0) - 1)[..., None]
    net = decoder(dropout=0.2, noise=0.1)
    task = kind(net, temperature=0.1, seed=0)
    before = class_similarity(net, data)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        numbers = data["sample_number"] + 4 * step
        task(data | {"sample_number": numbers})["loss"].backward()
        optimizer.step()
    assert before > 0.8
    assert class_similarity(net, data) < 0.6


SIZE = 16
TAPS = {"up0.1": (2, 4, 4, 5), "up1.1": (2, 8, 8, 3)}


def seed_pixels(folder: Path, hard_negatives: float) -> SeedPixels:
    """Two positive and two negative slices with random features, maps and seeds."""
    rng = np.random.default_rng(0)
    square = (SIZE, SIZE)
    shapes = {tap: (shape, "float16") for tap, shape in TAPS.items()}
    shapes |= dict.fromkeys(("cam", "gradient_map"), (square, "float16"))
    shapes["seeds"] = (square, "int8")
    values = {name: rng.normal(size=(4, *shape)) for name, (shape, _) in shapes.items()}
    values["seeds"] = rng.integers(-1, 2, (4, *square))
    values["seeds"][2:] = np.minimum(values["seeds"][2:], 0)
    cache = FeatureCache.create(folder, 4, shapes, slices_per_shard=4, attributes={})
    cache.write_shard(0, ["a", "b", "c", "d"], values)
    labels, rows = SeedLabels(cache), np.arange(4)
    pixels = TrainingPixels(cache, tuple(TAPS), labels, rows, count_labels(labels, rows))
    return SeedPixels(pixels, PixelsPerItem(6, 10, hard_negatives, 0.2), seed=0)


def embeddings_of_whole_maps(net: PixelDecoder, items: SeedPixels, stream: Stream) -> Tensor:
    """The naive form for sample numbers 0 to 3, in float64: every slice upsampled, concatenated
    and embedded whole, then indexed."""
    embedded = []
    for number in range(4):
        for row, places, size in items.choose(stream.position(number), number):
            maps = [torch.from_numpy(items.pixels.cache.read(tap, row).copy()) for tap in TAPS]
            large = [
                torch.nn.functional.interpolate(
                    stored.double().permute(0, 3, 1, 2), size, mode="bilinear"
                ).flatten(0, 1)
                for stored in maps
            ]
            whole = net(torch.cat(large).movedim(0, -1))  # (height, width, embedding)
            embedded.append(whole[places[:, 0], places[:, 1]])
    return torch.cat(embedded)


@pytest.mark.parametrize("hard_negatives", [0.0, 0.5])
def test_gradients_agree_with_the_naive_full_map_form(
    tmp_path: Path, hard_negatives: float
) -> None:
    torch.manual_seed(0)
    num_features = {tap: shape[0] * shape[3] for tap, shape in TAPS.items()}
    net = PixelDecoder(num_features, 8, 6)
    net.standardise(torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16))
    task = Contrast(net.double(), temperature=0.2, backend="torch")
    items = seed_pixels(tmp_path / "features.zarr", hard_negatives)
    stream = Stream(items, items.shard_of, seed=0)
    gathered = next(stream.batches(0, batch_size=4))
    assert gathered["features"].shape == (4, 16, 16)
    loss = task(gathered)["loss"]
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    naive = supcon_loss(
        embeddings_of_whole_maps(net, items, stream),
        gathered["labels"].flatten(),
        temperature=0.2,
        backend="torch",
    )
    expected = torch.autograd.grad(naive, list(net.parameters()))
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=0)
    for name, found, wanted in zip(dict(net.named_parameters()), gradients, expected, strict=True):
        assert wanted.abs().max() > 1e-3, name
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        Contrast(decoder(), temperature=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Contrast, CrossEntropy])
def test_two_processes_share_one_loss(kind: Kind, tmp_path: Path) -> None:
    """Each process holds half of the samples; loss and averaged gradient are those of all."""
    task = kind(decoder(0.5, 0.5), temperature=0.1, seed=0)
    loss = task(unequal_batch())["loss"]
    loss.backward()
    multiprocessing.spawn(_one_process, (kind, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    # of the contrast each process knows the whole; cross-entropy is its own share, scaled
    torch.testing.assert_close(torch.stack([one["loss"] for one in both]).mean(), loss.detach())
    for found in both:
        for gradient, parameter in zip(found["gradients"], task.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def _one_process(rank: int, kind: Kind, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(Path(folder) / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        plain = kind(decoder(0.5, 0.5), temperature=0.1, seed=0)
        task = torch.nn.parallel.DistributedDataParallel(plain)
        result = task(part(unequal_batch(), slice(2 * rank, 2 * rank + 2)))
        result["loss"].backward()
        gradients = [parameter.grad for parameter in plain.parameters()]
        found = {"loss": result["loss"].detach(), "gradients": gradients}
        torch.save(found, Path(folder) / f"{rank}.pt")
        distributed.barrier()  # nobody leaves while another one still talks to it
    finally:
        distributed.destroy_process_group()
    end_process(0)  # the interpreter's own end aborts where a thread of torch wants it then


def unequal_batch() -> dict[str, Tensor]:
    """The second half has fewer pixels that count."""
    data = batch()
    data["labels"][3] = -1
    return data
