"""``torch.load`` for files that nobody vouches for."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from hstu_trt.contract.errors import ArtefactError


def load_tensors(file: Path | IO[bytes], what: str) -> Any:
    """Loads tensors and plain containers only. Raises ArtefactError that begins with ``what``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            # Mapped, so that optimizer state beside the weights is never read.
            mapped = isinstance(file, Path) and zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise ArtefactError(f"{what} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # PyTorch's parsers raise whatever a wrong byte leads them to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(f"{what} is damaged, or holds more than plain tensors ({reason})") from None
