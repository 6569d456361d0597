"""``torch.load`` for files that nobody vouches for."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

from hstu_trt.contract.checkpoint_layout import FilePart, refuse_packed
from hstu_trt.contract.errors import ArtefactError


def load_tensors(file: Path | FilePart, what: str) -> Any:
    """Loads tensors and plain containers only. Raises ArtefactError that begins with ``what``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            is_archive = zipfile.is_zipfile(file)
            if is_archive:
                with zipfile.ZipFile(file) as archive:
                    refuse_packed(archive)
            if not isinstance(file, Path):
                file.seek(0)
            # Mapped, so that optimizer state beside the weights is never read.
            mapped = is_archive and isinstance(file, Path)
            stream = file if isinstance(file, Path) else cast(IO[bytes], file)
            return torch.load(stream, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise ArtefactError(f"{what} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # PyTorch's parsers raise whatever a wrong byte leads them to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(f"{what} is damaged, or holds more than plain tensors ({reason})") from None
