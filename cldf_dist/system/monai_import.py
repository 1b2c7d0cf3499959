"""MONAI without the packages that it only might need: a start in seconds, and fewer small files.

`import monai` tries every optional package there is, transformers and mlflow among them, and reads
about 5,000 modules where our nets need 500: ten seconds of a core for each process, and on the
metadata servers of a parallel file system as many openings for each rank of a job.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# what MONAI 1.6 imports if it finds it, and none of the nets that we take from it needs
NOT_NEEDED = (
    "cv2", "ignite", "itk", "lmdb", "matplotlib", "mlflow", "nibabel", "nni", "onnx",
    "onnxruntime", "openslide", "optuna", "pandas", "PIL", "pydicom", "pynrrd", "requests",
    "scipy", "skimage", "sklearn", "tensorboard", "tensorboardX", "tifffile", "torchvision",
    "transformers", "zarr",
)  # fmt: skip


def import_monai_quickly() -> None:
    """Import MONAI as if the packages of NOT_NEEDED were not installed; they can be used after it.

    For a process that is ours alone: in it MONAI's own readers, writers and handlers are missing.
    """
    if "monai" in sys.modules:
        return
    import torch  # noqa: F401  # looks for packages on its own

    with _absent(NOT_NEEDED):
        import monai  # noqa: F401


@contextmanager
def _absent(names: tuple[str, ...]) -> Iterator[None]:
    """Within it these packages cannot be imported; those that are there already stay."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own sign for "not found"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
