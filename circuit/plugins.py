"""Somebody's own Python file as a module; what `FILE.py:NAME` names."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from hashlib import sha256
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from circuit.artifacts import find_near
from circuit.errors import CircuitError, code_of_somebody
from circuit.reading import checked_path, file_digest, read_bytes

importing: ContextVar[Path | None] = ContextVar("importing", default=None)
"""The file that is being imported: what it does is no run of it as a script."""


_FILE = "circuit_file_"
"""What the names of modules begin with that are somebody's own files."""

_looked_at: dict[Path, str] = {}
"""sha256 of files that somebody's file imports, when last looked at before they were imported."""


class _Text(SourceFileLoader):
    """Executes the text that was digested.

    A cache in `__pycache__` knows a file by its size and the second in which it was written: of one
    that was edited within that second it is another's.
    """

    def __init__(self, name: str, path: str, text: bytes) -> None:
        super().__init__(name, path)
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._text, self.path)


def import_file(path: str | Path, *, missing: str) -> ModuleType:
    """Execute a file, once: under a name that its place and content give it, which no other has.

    Raises:
        CircuitError: there is no such file; `missing` says so.
        ImportError: it is no Python file.
        Exception: whatever its code raises.
    """
    path = checked_path(path)
    place = path.parent.resolve() / path.name
    text = read_bytes(path, missing=missing)
    content = sha256(text).hexdigest()
    name = f"{_FILE}{sha256(f'{place} {content}'.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        loader = _Text(name, str(path), text)
        spec = spec_from_file_location(name, path, loader=loader)
        if spec is None or path.suffix != ".py":
            raise ImportError("it is no Python file")
        sys.modules[name] = module = module_from_spec(spec)
        token = importing.set(path)
        try:
            loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            importing.reset(token)
    return sys.modules[name]


def import_as(name: str, module: ModuleType) -> None:
    """Let other files import a file that was executed; the last one of a name, where it was edited.

    A module of that name from elsewhere stays.
    """
    if getattr(sys.modules.get(name), "__name__", _FILE).startswith(_FILE):
        sys.modules[name] = module


def let_import_from(folder: Path) -> None:
    """Let somebody's code import what stands in a folder, behind all that could be imported."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def code_digests(path: str | Path, *, missing: str = "no such file") -> dict[str, str]:
    """sha256 of a file and of what it imports from beside itself, and that in turn.

    Imports are read from the text, wherever they stand in it: nothing is executed. What is imported
    by other means, or stands elsewhere, as installed packages do, is not looked at.

    Returns:
        By name, relative to the file's folder.

    Raises:
        CircuitError: there is no such file; or what is imported stands beside the file, and another
            of that name would be imported; or it was imported, and its file has changed since.
    """
    path = checked_path(path)
    folder, todo, digests = path.absolute().parent, [path.absolute()], dict[str, str]()
    while todo:
        file = todo.pop()
        name = file.relative_to(folder).as_posix()
        if name not in digests:
            digests[name] = file_digest(file, missing=missing)
            if digests.keys() != {path.name}:
                _refuse_stale(file, name, digests[name])
            todo += _imports_beside(file, folder)
    return digests


def _refuse_stale(file: Path, name: str, digest: str) -> None:
    """Refuse a module that has changed since it was imported: its earlier code would be executed.

    A file that is named itself is executed under a name of its content, what it imports once in a
    process. What was imported before its file was first looked at is taken to be what it was.

    Raises:
        CircuitError: it has.
    """
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if module not in sys.modules:
        _looked_at[file] = digest
    elif _looked_at.setdefault(file, digest) != digest:
        raise CircuitError(
            "has changed since this process imported it, which would go on with it as it was",
            where=file,
            fix="start a new process (in a notebook: restart the kernel), or undo the change",
        )


def _imports_beside(file: Path, folder: Path) -> Iterator[Path]:
    """The files of a folder that a file there names in its imports."""
    try:
        tree = ast.parse(read_bytes(file))
    except (SyntaxError, ValueError):  # whoever executes it is told
        return
    package = file.relative_to(folder).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = [*above, *(node.module.split(".") if node.module else ())]
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in names:
            if parts[0] == __name__.partition(".")[0] or not _stands_in(folder, parts[0], file):
                continue
            for depth in range(1, len(parts) + 1):  # `import a.b` executes `a`, too
                at = folder.joinpath(*parts[:depth])
                yield from filter(Path.is_file, (at.with_suffix(".py"), at / "__init__.py"))


def _stands_in(folder: Path, name: str, file: Path) -> bool:
    """Whether an import finds a name in a folder, which is looked through after all others.

    Raises:
        CircuitError: it stands there, and another one is found.
    """
    package, module = folder / name / "__init__.py", folder / f"{name}.py"
    if not package.parent.is_dir() and not module.is_file():
        return False
    try:
        spec = find_spec(name)
    except ValueError:  # of a module that was made by hand
        spec = None
    if spec is None or (spec.origin is None and name not in sys.modules):
        return True  # a folder without __init__.py comes after all others
    inside = spec.submodule_search_locations
    first = [spec.origin] if spec.origin is not None else list(inside or ())
    up = 1 if inside is not None and spec.origin is not None else 0
    # where links stand, not where they lead
    holders = [Path(one).parents[up].resolve() for one in first if Path(one).is_absolute()]
    if folder.resolve() in holders or not first:
        return True
    if not package.is_file() and not module.is_file():
        return False  # a folder of anything that is called like an installed package
    raise CircuitError(
        f"imports {name}, which stands beside it, and gets another: {first[0]}",
        where=file,
        fix=f"rename {module if module.is_file() else package.parent}",
    )


def named_code(names: Iterable[str], near: Path) -> dict[str, str]:
    """`code_digests` of the files that several `FILE.py:NAME` name, as these name them."""
    digests: dict[str, str] = {}
    for file in dict.fromkeys(name.rpartition(":")[0] for name in names):
        of = code_digests(find_near(checked_path(file), near))
        digests |= {(Path(file).parent / name).as_posix(): digest for name, digest in of.items()}
    return digests


def refuse_changed_code(
    now: Mapping[str, str], recorded: Mapping[str, str], *, where: Path, since: str, fix: str
) -> None:
    """Refuse files that are not those that were recorded.

    Args:
        now, recorded: as `code_digests` gives them.
        where: names are relative to.

    Raises:
        CircuitError: names the first of them.
    """
    for name in dict.fromkeys((*recorded, *now)):
        ours, theirs = now.get(name), recorded.get(name)
        if ours == theirs:
            continue
        if theirs is None:
            what = f"is imported, and was not at the time of {since}"
        elif ours is None:
            what = f"is gone or no longer imported, and was at the time of {since}"
        else:
            what = f"has changed since {since}: sha256 {ours[:12]}, recorded {theirs[:12]}"
        raise CircuitError(what, where=where / name, fix=fix)


def is_file_name(name: str) -> bool:
    """Whether it has the form `FILE.py:NAME`."""
    return name.rpartition(":")[0].endswith(".py")


def import_named_file(path: str | Path, near: Path | None = None, *, what: str) -> ModuleType:
    """A file; what stands beside it can be imported by it, as where it is run as a script.

    Args:
        path: relative to the nearest folder above `near` that has it, then to the current one.
        what: it is the file of, for refusals: `the model`.

    Raises:
        CircuitError: there is no such file, or whatever it raises is told.
    """
    path = checked_path(find_near(path, near))
    let_import_from(path.absolute().parent)
    with code_of_somebody(lambda it: f"{what}'s file cannot be imported ({it})", where=path):
        return import_file(path, missing=f"{what}'s file cannot be read: there is none")


def import_name(name: str, near: Path | None = None, *, what: str) -> Any:
    """What `FILE.py:NAME` names; raises as `import_named_file`, or where there is no such name."""
    path, _, attribute = name.rpartition(":")
    if not is_file_name(name):
        raise CircuitError(f"{what} is named '{name}'", expected="FILE.py:NAME")
    module = import_named_file(path, near, what=what)
    if not hasattr(module, attribute):
        fix = nearest(attribute, module)
        raise CircuitError(f"has no '{attribute}'", where=path, expected="FILE.py:NAME", fix=fix)
    return getattr(module, attribute)


def nearest(name: str, module: ModuleType) -> str | None:
    """The `fix` of a refusal of a name that a module lacks; None where none to call is near it."""
    near = get_close_matches(name, [n for n, of in vars(module).items() if callable(of)], n=1)
    return f"did you mean {near[0]}?" if near else None


def refuse_while_importing(doing: str) -> None:
    """Refuse what only a script that is run may do.

    Raises:
        CircuitError: a file is being imported for what it defines.
    """
    path = importing.get()
    if path is not None:
        raise CircuitError(
            f"{doing} when it is imported, where only what it defines is asked for",
            where=path,
            fix='put the loop under `if __name__ == "__main__":`',
        )
