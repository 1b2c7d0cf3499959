"""A training on labelled slices, from shards to a saved net: every training but the decoder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from cldf_dist.config import Augment, Config
from cldf_dist.data.readers import datasets
from cldf_dist.data.shards.remote import ShardCache
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.stream import LabelledSlices, Stream
from cldf_dist.runs.run import Run
from cldf_dist.training.export import save_net
from cldf_dist.training.fit import fit
from cldf_dist.training.model_card import NetCard, write_card
from cldf_dist.training.time_estimate import training_time

MakeTask = Callable[[Config, int], nn.Module]  # settings and number of channels -> net and loss


def shard_set(config: Config, run: Run) -> ShardSet:
    """The prepared slices of a run, local or remote."""
    cache = ShardCache.of(config.data)
    return ShardSet(run.needs("prepare"), on_damaged=config.data.on_damaged, cache=cache)


def training_stream(config: Config, shards: ShardSet, augment: Augment) -> Stream:
    """The labelled slices of the training patients, with augmentation."""
    items = LabelledSlices(shards.split("train"), augment, config.seed)
    return Stream(items, items.groups, config.seed)


def validation_stream(config: Config, shards: ShardSet) -> Stream:
    """The labelled slices of the validation patients, without augmentation."""
    items = LabelledSlices(shards.split("validation"), None, config.seed)
    return Stream(items, items.groups, config.seed)


def train_on_slices(
    config: Config,
    run: Run,
    make_task: MakeTask,
    card: NetCard,
    describe: Callable[[ShardSet], dict[str, Any]],
) -> dict[str, Any]:
    """Train, save and describe a net; returns what to keep with DONE.

    `card.section` names its settings, `describe` returns what is needed to build the net again.
    """
    settings = getattr(config, card.section)
    shards = shard_set(config, run)
    task = make_task(config, len(shards.manifest["channels"]))
    stream = training_stream(config, shards, settings.augment)
    net = fit(task, stream, settings.fit, run, validation_stream(config, shards))
    if run.is_main:
        num_channels = len(shards.manifest["channels"])
        save_net(net, run.folder, {**describe(shards), "num_channels": num_channels})
        write_card(run, shards, card)
    return {"parameters": sum(p.numel() for p in net.parameters())}


def estimate_on_slices(config: Config, make_task: MakeTask, section: str) -> dict[str, str]:
    """The size of the net and the time of its training, as `--dry-run` prints them."""
    num_channels = len(datasets.channels(config.data))
    task = make_task(config, num_channels)
    fit_settings = getattr(config, section).fit
    return training_time(task, fit_settings, num_channels, config.data.image_size)
