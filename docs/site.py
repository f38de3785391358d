"""What the site (`make docs`) takes from outside of docs/: the README as its first page, the pages
beside it, the notebooks. Links are those of the repository, rewritten for the site.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

NOTEBOOKS = (
    "notebooks/1_explore_cached_activations.ipynb",
    "notebooks/2_follow_one_route.ipynb",
    "notebooks/3_write_your_own_scalar.ipynb",
)
PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CITATION.cff": "CITATION.cff",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "LICENSE": "LICENSE",
    "SECURITY.md": "SECURITY.md",
    **{
        f"notebooks/{name}.ipynb": f"notebooks/{name}.ipynb"
        for name in (
            "1_explore_cached_activations",
            "2_follow_one_route",
            "3_write_your_own_scalar",
        )
    },
}
"""Where a file of the repository stands in the site; those of docs/ are at its top."""
FOLDERS = {"notebooks": NOTEBOOKS[0]}
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside of docs/."""
    root = posixpath.dirname(config.config_file_path)
    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=posixpath.join(root, source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the repository, as links of the site."""
    source = {place: source for source, place in PLACES.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(source if source is not None else f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        return found[1] + (PLACES | FOLDERS).get(target, target.removeprefix("docs/"))

    return LINK.sub(link, markdown)
