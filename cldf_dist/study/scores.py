"""The strict scores of one experiment as arrays (trainings, patients), read from its CSV rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan

import numpy as np
import numpy.typing as npt

from cldf_dist.methods import CLDF, CLDF_PLUS, Role, method_named
from cldf_dist.scoring.strict_protocol import HEADLINE, ORACLE
from cldf_dist.study.rows import Row, values_of


@dataclass(frozen=True)
class StrictScores:
    """The scores of the test patients of one experiment and variant in each training."""

    seeds: tuple[str, ...]
    patients: tuple[str, ...]
    methods: tuple[str, ...]
    rows: dict[tuple[str, str, str], Row]  # by method, seed, patient

    @classmethod
    def of(cls, cases: Iterable[Row]) -> StrictScores:
        """The scores in rows of cases.csv, which are of one experiment and variant.

        They are those of the headline rule; of `oracle_intensity` those of its own rule.
        """
        kept = [row for row in cases if row["rule"] in (HEADLINE, ORACLE)]
        return cls(
            seeds=tuple(values_of(kept, "seed")),
            patients=tuple(values_of(kept, "patient")),
            methods=tuple(values_of(kept, "method")),
            rows={(row["method"], row["seed"], row["patient"]): row for row in kept},
        )

    def values(self, method: str, metric: str) -> npt.NDArray[np.float64]:
        """(trainings, patients); NaN for a true negative and for a method that was left out."""
        return np.array(
            [
                [self._value(method, seed, patient, metric) for patient in self.patients]
                for seed in self.seeds
            ]
        )

    def count(self, method: str, outcome: str) -> list[int | None]:
        """The number of patients with this outcome in each training; None where the training left
        the method out."""
        return [
            sum(
                self.rows[method, seed, patient]["outcome"] == outcome
                for patient in self.patients
                if (method, seed, patient) in self.rows
            )
            if exists
            else None
            for seed, exists in zip(self.seeds, self.exists(method))
        ]

    def exists(self, method: str) -> list[bool]:
        """True for each training that has the method; one of ours may have been left out."""
        return [
            any((method, seed, patient) in self.rows for patient in self.patients)
            for seed in self.seeds
        ]

    @property
    def ours(self) -> list[str]:
        """Those of the methods that are ours."""
        return [method for method in self.methods if method_named(method).role is Role.OURS]

    def _value(self, method: str, seed: str, patient: str, metric: str) -> float:
        text = self.rows.get((method, seed, patient), {}).get(metric, "")
        return float(text) if text else nan


def picked_patients(scores: StrictScores) -> dict[str, tuple[str, float]]:
    """The best, the median and the worst patient of the first training, each with its Dice.

    By `cldf_plus` where the training has it, else by `cldf`; of an even number the worse of the two
    in the middle. Empty where no Dice is defined.
    """
    method = picked_by(scores)
    if not scores.seeds or method not in scores.methods:
        return {}
    dice = zip(scores.values(method, "dice")[0].tolist(), scores.patients)
    ranked = sorted((value, patient) for value, patient in dice if not np.isnan(value))
    if not ranked:
        return {}
    places = {"best": -1, "median": (len(ranked) - 1) // 2, "worst": 0}
    return {which: ranked[place][::-1] for which, place in places.items()}


def picked_by(scores: StrictScores) -> str:
    """The method by whose Dice pictures are picked, of those that the first training has."""
    return CLDF_PLUS if scores.seeds and scores.exists(CLDF_PLUS)[0] else CLDF
