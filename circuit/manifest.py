"""What a command has written into a folder, by name and by content.

A manifest is a file like others, and may be edited, copied or made up. So a name counts as the
command's own only if the command writes such names, and its content has to be what was written. Of
a file that is appended to there is no digest; its rows have theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from circuit.documents import Document


def digest(payload: bytes) -> str:
    """Digest of a file's content."""
    return hashlib.sha256(payload).hexdigest()


class Claimed(Document):
    """The content of a manifest; those of version 0.1 tell no digests."""

    command: str
    files: list[str]
    sha256: dict[str, list[str]] | None = None


class Manifest:
    """The names that a command has claimed in a folder, and digests of what it wrote under them.

    Attributes:
        owned: claimed names that the command writes, in the order of their claims.
    """

    def __init__(self, command: str, writes: Sequence[str], claimed: Claimed | None = None) -> None:
        """A new one, or the one that a folder has.

        Args:
            command: whose it is.
            writes: patterns (of `fnmatch`) of all names that the command writes.
            claimed: what the folder's says.
        """
        self.command, self.writes = command, tuple(writes)
        listed = [] if claimed is None else claimed.files
        known = None if claimed is None else claimed.sha256
        self.owned = {name: None for name in listed if self.may_be(name)}
        self._others = [name for name in listed if name not in self.owned]
        self._digests = {name: [] for name in listed} if known is None else dict(known)
        self._present: dict[str, str] = {}

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        names = [*self._others, *self.owned]
        digests = {name: self._digests[name] for name in names if name in self._digests}
        return {"command": self.command, "files": names, "sha256": digests}

    def may_be(self, name: str) -> bool:
        """Whether the command writes such names."""
        return any(name == one or fnmatchcase(name, one) for one in self.writes)

    def claim(self, contents: Mapping[str, bytes] | Iterable[str]) -> bool:
        """Take names as the command's own, and note what is going to stand there.

        Until it does, what stands there now counts, too. Returns whether the manifest has changed.
        """
        changed = False
        for name in contents:
            changed |= name not in self.owned
            self.owned[name] = None
        for name, payload in contents.items() if isinstance(contents, Mapping) else ():
            new, now = digest(payload), self._present.get(name)
            noted = [new] if now in (None, new) else [str(now), new]
            changed |= self._digests.get(name) != noted
            self._digests[name] = noted
        return changed

    def wrote(self, name: str) -> None:
        """What was noted of a name stands there now."""
        self._present[name] = self._digests[name][-1]

    def forget(self, name: str) -> None:
        """It stands there no more."""
        del self.owned[name]
        self._digests.pop(name, None)
        self._present.pop(name, None)

    def is_as_written(self, name: str, path: Path) -> bool | None:
        """Whether a file is one that the command wrote; None if its rows alone can tell.

        Of a file of version 0.1 its name is all that is known.
        """
        if name in self._present:
            return True
        if path.is_symlink() or not path.is_file():
            return False
        if name not in self._digests:
            return None
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if self._digests[name] and found not in self._digests[name]:
            return False
        self._present[name] = found
        return True
