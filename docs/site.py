"""What the site (`make docs`) takes from outside of docs/: the README as its first page, the pages
beside it, the notebooks. Links are those of the repository, rewritten for the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("notebooks/*.ipynb"))
PLACES = {
    "README.md": "index.md",
    **{
        name: name
        for name in (
            "CHANGELOG.md",
            "CITATION.cff",
            "CONTRIBUTING.md",
            "LICENSE",
            "SECURITY.md",
            *NOTEBOOKS,
        )
    },
}
"""Where a file of the repository stands in the site; those of docs/ are at its top."""
FOLDERS = {"notebooks": NOTEBOOKS[0]}
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside of docs/."""
    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the repository, as links of the site."""
    source = {place: source for source, place in PLACES.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(source if source is not None else f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        return found[1] + (PLACES | FOLDERS).get(target, target.removeprefix("docs/"))

    return LINK.sub(link, markdown)
