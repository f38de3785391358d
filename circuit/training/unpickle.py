"""The one reader of what `torch.save` wrote: tensors, and nothing that would run."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pickle import UnpicklingError
from typing import Any

from circuit.errors import CircuitError
from circuit.lazy import torch

_GLOBAL = re.compile(r"GLOBAL ([\w.]{1,80})")


def unpickle(payload: bytes, *, where: object, more: str, damaged: str) -> Any:
    """What was saved, on the CPU; nothing in it is executed.

    torch's own messages advise to load the file in a way that executes it: they are not passed on.

    Args:
        payload: the file's bytes.
        where: the file, for messages.
        more: what to do about a file that holds more than tensors.
        damaged: what to do about a file that cannot be read.

    Raises:
        CircuitError: it holds more than tensors, would take more memory than it has bytes, is
            damaged, or is no file of `torch.save`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            size = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        size = 0  # the format of torch before 1.6, or damaged, which torch will find
    if size > len(payload):  # torch writes none, reads them, and a byte may hold a thousand
        raise CircuitError("refused: its records are compressed", where=where, fix=damaged)
    load = torch.load  # imports torch, of which a failure says nothing about the file
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle's protocols, for torch's authors
            return load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except (UnpicklingError, AttributeError, TypeError) as error:
        named = _GLOBAL.search(str(error))
        what = f" (it names {named[1]})" if named else ""
        raise CircuitError(
            f"refused: it holds more than tensors{what}, and reading that would run its code",
            where=where,
            fix=more,
        ) from None
    except Exception:  # noqa: BLE001 - bytes that torch did not write may lead anywhere in it
        raise CircuitError(
            "is damaged, or no file of torch.save", where=where, fix=damaged
        ) from None
