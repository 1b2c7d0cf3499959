"""The phantom as a data set: what `data.dataset=phantom` reads in place of files."""

import dataclasses
from pathlib import Path

from cldf_dist.config import Data
from cldf_dist.data.formats.nifti import Volume
from cldf_dist.data.readers.body_mask import body_mask_of, body_mask_rule
from cldf_dist.data.readers.phantom import CHANNELS, PhantomSettings, phantom_patient


def channels(settings: Data) -> tuple[str, ...]:
    """Names of the image channels, in their order."""
    return CHANNELS


def objects(settings: Data) -> tuple[str, ...]:
    """Names of the objects that `data.object` may be."""
    return ("lesion",)


def patients(settings: Data) -> list[str]:
    """Names of all patients, sorted."""
    return [f"phantom_{index:03d}" for index in range(settings.phantom.num_patients)]


def patient_files(settings: Data, patient: str) -> list[Path]:
    """None: nothing is read."""
    return []


def listing_faults(settings: Data, patient: str) -> list[str]:
    """None: nothing can be missing."""
    return []


def read_patient(settings: Data, patient: str) -> Volume:
    """One patient, with its mask."""
    names = patients(settings)
    if patient not in names:
        raise ValueError(f"the phantom has patients {names[0]} to {names[-1]}; got {patient!r}")
    made = PhantomSettings(**dataclasses.asdict(settings.phantom))
    image, mask, affine = phantom_patient(names.index(patient), made)
    inside = body_mask_of(image, body_mask_rule(settings))
    return Volume(patient, image, inside, mask > 0, affine)
