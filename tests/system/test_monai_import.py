"""A process of the program imports what it needs of MONAI, and nothing else goes missing by it."""

from collections.abc import Callable
from typing import Any

Start = Callable[..., Any]
SCRIPT = """
import sys
from cldf_dist.system.monai_import import NOT_NEEDED, import_monai_quickly
import_monai_quickly()
print(len([name for name in sys.modules if name.partition('.')[0] in NOT_NEEDED]))

from cldf_dist.nets.classifiers import CamClassifier, NoisyClassifier
from cldf_dist.nets.unet import build_unet
import PIL.Image, matplotlib, mlflow, scipy.ndimage, transformers
print(len([name for name in sys.modules if name.partition('.')[0] == 'mlflow']))
"""


def test_monai_comes_without_what_it_only_might_need_and_that_can_be_imported_later(
    start: Start,
) -> None:
    process = start("-c", SCRIPT)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    early, late = (int(line) for line in said.split())
    assert early == 0
    assert late > 50


def test_packages_that_are_there_already_stay(start: Start) -> None:
    process = start("-c", "import scipy.ndimage as before\n" + SCRIPT.replace("print", "repr"))
    assert process.wait() == 0, process.communicate()[1]
