"""The import of MONAI without its optional packages: a faster start, and fewer small files.

`import monai` imports every optional package that is installed, transformers and mlflow among them.
It reads about 5,000 modules where our nets need 500: ten seconds of a core for each process, and on
the metadata servers of a parallel file system as many openings for each rank of a job.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# packages that MONAI 1.6 imports if they are installed, and that our nets do not need
NOT_NEEDED = (
    "cv2", "ignite", "itk", "lmdb", "matplotlib", "mlflow", "nibabel", "nni", "onnx",
    "onnxruntime", "openslide", "optuna", "pandas", "PIL", "pydicom", "pynrrd", "requests",
    "scipy", "skimage", "sklearn", "tensorboard", "tensorboardX", "tifffile", "torchvision",
    "transformers", "zarr",
)  # fmt: skip


def import_monai_quickly() -> None:
    """Import MONAI as if the packages of NOT_NEEDED were not installed.

    They can be imported afterwards. For our own processes: MONAI's readers, writers and handlers
    are missing in them.
    """
    if "monai" in sys.modules:
        return
    import torch  # noqa: F401  # looks for packages on its own

    with _absent(NOT_NEEDED):
        import monai  # noqa: F401


@contextmanager
def _absent(names: tuple[str, ...]) -> Iterator[None]:
    """A context in which these packages cannot be imported, unless they already are."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own sign for "not found"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
