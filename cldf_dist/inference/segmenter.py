"""All trained nets of a run, which compute the score maps of whole patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cldf_dist.config import Config, flatten
from cldf_dist.data.slices import body_mask
from cldf_dist.inference.frozen_nets import FrozenNets
from cldf_dist.inference.loading import load_decoder
from cldf_dist.inference.score_maps import Decoder, SliceBatch, score_map
from cldf_dist.methods import CLDF, METHODS, Role
from cldf_dist.runs.run import DONE, Run
from cldf_dist.scoring.masks import FloatArray, PatientScores, smoothed_over_slices
from cldf_dist.system.distributed import accelerator
from cldf_dist.system.memory_format import fast_memory_format
from cldf_dist.training.export import read_description


@dataclass(frozen=True)
class Segmenter:
    """The nets of a run, ready to score slices."""

    config: Config
    nets: FrozenNets
    decoders: dict[str, Decoder]  # by method

    @classmethod
    def load(cls, config: Config, run: Run) -> Segmenter:
        """The nets of a run whose trainings are finished, on this process's device."""
        folder = run.needs("train-decoder")
        decoders = {CLDF: load_decoder(folder)}
        for method in METHODS:
            if method.has_decoder and (folder / method.name / DONE).exists():
                decoders[method.name] = load_decoder(folder / method.name)
        # new scans are seen as the training slices were, on whatever device
        precision = read_description(folder)["features_precision"]
        features = replace(config.features, precision=precision)
        return cls(replace(config, features=features), FrozenNets.load(config, run), decoders)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the settings enable and select, and whose nets exist."""
        settings = flatten(self.config)
        asked = self.config.segment.methods
        return tuple(
            method.name
            for method in METHODS
            if method.role is not Role.ORACLE
            and (not asked or method.name in asked)
            and (not method.has_decoder or method.name in self.decoders)
            and (not method.enabled or settings[method.enabled])
        )

    def score(
        self,
        patient: str,
        keys: list[str],
        images: FloatArray,
        methods: Sequence[str] | None = None,
    ) -> PatientScores:
        """Score maps of prepared slices (slices, channels, height, width), by `methods` or all.

        The slices are those of one patient, in order.
        """
        wanted = self.methods if methods is None else methods
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(keys), self.config.segment.batch_size):
            chosen = slice(start, start + self.config.segment.batch_size)
            batch = self.batch(images[chosen], keys[chosen], wanted)
            scores = {method: score_map(batch, method).cpu() for method in wanted}
            parts.append({**scores, "probability": batch.probability.cpu()})
        joined = {n: torch.cat([p.pop(n) for p in parts]).numpy() for n in list(parts[0])}
        probability = smoothed_over_slices(joined.pop("probability"))
        return PatientScores(patient, joined, probability, body_mask(images))

    def batch(self, images: FloatArray, keys: list[str], methods: Sequence[str]) -> SliceBatch:
        """The slices on this process's device, to be scored by `methods`."""
        device = accelerator().device
        pixels = torch.from_numpy(images).to(device)
        return SliceBatch(
            config=self.config,
            nets=self.nets,
            decoders=self.decoders,
            images=pixels.contiguous(memory_format=fast_memory_format(device)),
            body_mask=torch.from_numpy(body_mask(images)).to(device),
            keys=keys,
            methods=methods,
        )
