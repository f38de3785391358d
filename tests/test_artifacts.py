"""Output folders: what is not ours stays, and no reader ever sees half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit import artifacts
from circuit.artifacts import (
    RowLog,
    atomic_write_bytes,
    dump_row,
    dump_rows,
    read_jsonl,
)
from circuit.errors import CircuitError
from circuit.sealed import sealed

OutputFolder = partial(artifacts.OutputFolder, writes=["*"])
NAMES = ["a.json", "b.jsonl", "sub/c.pt", "sub/d.pt", "sub/deep/e", ".hidden"]

SYNC = os.fsync  # that of the system, before a session's tests go without


@contextmanager
def a_folder() -> Iterator[Path]:
    """A folder for one drawn example."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path).resolve()


def put(root: Path, name: str, payload: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)


def files_of(root: Path) -> dict[str, bytes]:
    """Every file but locks and manifests."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith((".lock", ".manifest.json"))
    }


def write_all(root: Path, command: str, names: set[str], payload: bytes, **how: Any) -> None:
    with OutputFolder(root, command, **how) as folder:
        folder.clear()
        for name in sorted(names):
            folder.write_bytes(name, payload)


partitions = st.dictionaries(
    st.sampled_from(NAMES), st.sampled_from(["first", "both", "second", "foreign", "other command"])
)


@settings(max_examples=25)
@given(kind_of=partitions)
def test_overwrite_replaces_exactly_the_listed_files(kind_of: dict[str, str]) -> None:
    """Own files are those of the first run; everything else keeps its bytes: files lost 0."""

    def of(*kinds: str) -> set[str]:
        return {name for name, kind in kind_of.items() if kind in kinds}

    with a_folder() as root:
        write_all(root, "mine", of("first", "both"), b"old")
        write_all(root, "other", of("other command"), b"other")
        for name in of("foreign"):
            put(root, name, b"foreign")
        write_all(root, "mine", of("second", "both"), b"new", overwrite=True)
        expected = dict.fromkeys(of("second", "both"), b"new")
        expected |= dict.fromkeys(of("other command"), b"other")
        expected |= dict.fromkeys(of("foreign"), b"foreign")
        assert files_of(root) == expected
        assert json.loads((root / "mine.manifest.json").read_text())["files"] == sorted(
            of("second", "both")
        )


@settings(max_examples=12)
@given(own=st.sets(st.sampled_from(NAMES)), wanted=st.sampled_from(NAMES))
def test_a_foreign_file_of_a_wanted_name_is_refused_and_stays(own: set[str], wanted: str) -> None:
    own -= {wanted}
    with a_folder() as root:
        write_all(root, "mine", own, b"old")
        put(root, wanted, b"foreign")
        before = files_of(root)
        with OutputFolder(root, "mine", overwrite=True) as folder:
            with pytest.raises(CircuitError, match="was not written by `circuit mine`") as caught:
                folder.write_bytes(wanted, b"new")
            assert str(root / wanted) in str(caught.value)
            with pytest.raises(CircuitError, match="was not written by"):
                folder.claim(["fresh", wanted])
            with pytest.raises(CircuitError, match="was not written by"):
                folder.clear(planned=["fresh", wanted])
        assert files_of(root) == before


def test_a_folder_with_outputs_is_refused_without_overwrite(tmp_path: Path) -> None:
    write_all(tmp_path, "mine", {"a", "b"}, b"old")
    with pytest.raises(CircuitError, match=r"holds 2 files of an earlier `circuit mine` \(a, "):
        write_all(tmp_path, "mine", {"a"}, b"new")
    assert files_of(tmp_path) == {"a": b"old", "b": b"old"}
    write_all(tmp_path, "other", {"c"}, b"beside")  # another command is free to use the folder
    with OutputFolder(tmp_path, "mine", resume=True) as folder:
        folder.write_bytes("a", b"newer")
    assert files_of(tmp_path) == {"a": b"newer", "b": b"old", "c": b"beside"}


def test_a_folder_whose_outputs_the_user_removed_is_free_again(tmp_path: Path) -> None:
    write_all(tmp_path, "mine", {"a"}, b"old")
    (tmp_path / "a").unlink()
    put(tmp_path, "b", b"foreign")
    write_all(tmp_path, "mine", {"a"}, b"new")
    assert files_of(tmp_path) == {"a": b"new", "b": b"foreign"}


@pytest.mark.parametrize("name", ["../x", "sub/../../x", "/etc/x", ".", "", "..", "sub/.."])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    put(tmp_path, "x", b"foreign")
    with (
        OutputFolder(root, "mine", overwrite=True) as folder,
        pytest.raises(CircuitError, match="leaves the output folder"),
    ):
        folder.write_bytes(name, b"new")
    assert files_of(tmp_path) == {"x": b"foreign"}


def test_a_manifest_that_lists_outside_files_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_all(root, "mine", {"a"}, b"old")
    put(tmp_path, "x", b"foreign")
    manifest = {"command": "mine", "files": ["../x"]}
    (root / "mine.manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CircuitError, match="leaves the output folder"):
        write_all(root, "mine", set(), b"new", overwrite=True)
    assert files_of(tmp_path)["x"] == b"foreign"


def edited(root: Path, **changes: Any) -> None:
    """Another manifest than the one that was written."""
    path = root / "mine.manifest.json"
    claimed = json.loads(path.read_text())
    del claimed["digest"]
    path.write_text(json.dumps(sealed(claimed | changes)))


@pytest.mark.parametrize("how", ["as an old one", "with its digest", "without a digest"])
def test_a_manifest_cannot_claim_what_the_command_does_not_write(tmp_path: Path, how: str) -> None:
    """Whatever it says: of `a*` and `sub/*`, no thesis is one."""
    writes = ["a*", "sub/*"]
    for payload in (b"old", b"new"):
        with artifacts.OutputFolder(tmp_path, "mine", writes=writes, overwrite=True) as folder:
            folder.clear()
            folder.write_bytes("a.json", payload)
        put(tmp_path, "thesis.tex", b"years of work")
        known = json.loads((tmp_path / "mine.manifest.json").read_text())
        digest = hashlib.sha256(b"years of work").hexdigest()
        digests = {"with its digest": {"thesis.tex": [digest]}, "without a digest": {}}
        edited(tmp_path, files=["a.json", "thesis.tex"])
        if how == "as an old one":
            payload = {"command": "mine", "files": ["a.json", "thesis.tex"]}
            (tmp_path / "mine.manifest.json").write_text(json.dumps(payload))
        else:
            edited(tmp_path, sha256=known["sha256"] | digests[how])
    assert files_of(tmp_path) == {"a.json": b"new", "thesis.tex": b"years of work"}
    with artifacts.OutputFolder(tmp_path, "mine", writes=writes, overwrite=True) as folder:
        folder.clear()
    assert files_of(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("what", ["edited", "another file", "a link", "a file of a claimed name"])
def test_what_the_user_made_of_a_file_is_not_lost(tmp_path: Path, what: str) -> None:
    root, precious = tmp_path / "root", tmp_path / "precious"
    write_all(root, "mine", {"a", "b"}, b"old")
    precious.write_bytes(b"old")
    (root / "a").unlink()
    if what == "a link":
        (root / "a").symlink_to(precious)
    elif what == "a file of a claimed name":
        edited(root, sha256={})  # as after a kill between the claim and the file
        put(root, "a", b"theirs")
    else:
        put(root, "a", b"older" if what == "edited" else b"\0" * 2**20)
    before = files_of(tmp_path)
    with pytest.raises(CircuitError, match="a: was changed since `circuit mine` wrote it; move"):
        write_all(root, "mine", {"a", "b"}, b"new", overwrite=True)
    with (
        OutputFolder(root, "mine", resume=True) as folder,
        pytest.raises(CircuitError, match="was changed since"),
    ):
        folder.write_bytes("a", b"new")
    assert files_of(tmp_path) == before


def test_a_manifest_of_version_0_1_lets_the_commands_own_names_be_replaced(tmp_path: Path) -> None:
    write_all(tmp_path, "mine", {"a", "b"}, b"old")
    payload = {"command": "mine", "files": ["a", "b"]}
    (tmp_path / "mine.manifest.json").write_text(json.dumps(payload))
    with OutputFolder(tmp_path, "mine", resume=True) as folder:
        folder.write_bytes("a", b"new")
    put(tmp_path, "a", b"edited since")
    with pytest.raises(CircuitError, match="a: was changed since"):
        write_all(tmp_path, "mine", {"a"}, b"newer", overwrite=True)
    (tmp_path / "a").unlink()
    write_all(tmp_path, "mine", {"a"}, b"newer", overwrite=True)
    assert files_of(tmp_path) == {"a": b"newer"}


@pytest.mark.parametrize("killed_before", [1, 2])
def test_a_writer_killed_at_any_write_leaves_files_that_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: int
) -> None:
    """Between the manifest, which comes first, and the file."""
    write_all(tmp_path, "mine", {"a"}, b"old")
    write, left = artifacts.atomic_write_bytes, killed_before

    def dying(path: Path, payload: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        write(path, payload)

    with OutputFolder(tmp_path, "mine", resume=True) as folder, monkeypatch.context() as patch:
        patch.setattr(artifacts, "atomic_write_bytes", dying)
        with pytest.raises(KeyboardInterrupt):
            folder.write_bytes("a", b"new")
    assert files_of(tmp_path) == {"a": b"old"}
    write_all(tmp_path, "mine", {"a"}, b"newest", overwrite=True)
    assert files_of(tmp_path) == {"a": b"newest"}


def test_rows_that_are_appended_to_are_known_by_their_digests(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, "mine") as folder:
        folder.claim(["rows.jsonl"])
        log = RowLog(folder.path("rows.jsonl"))
        log.append({"step": 1})
        log.close()
    rows = (tmp_path / "rows.jsonl").read_bytes()
    put(tmp_path, "rows.jsonl", rows.replace(b'"step": 1', b'"step": 2'))
    with pytest.raises(CircuitError, match="was changed since"):
        write_all(tmp_path, "mine", {"a"}, b"new", overwrite=True)
    put(tmp_path, "rows.jsonl", rows + b'{"step": 2, "torn')
    write_all(tmp_path, "mine", {"a"}, b"new", overwrite=True)
    assert files_of(tmp_path) == {"a": b"new"}


def test_a_linked_subfolder_is_not_followed(tmp_path: Path) -> None:
    root, home = tmp_path / "root", tmp_path / "home"
    write_all(root, "mine", {"sub/a"}, b"old")
    put(home, "a", b"precious")
    (root / "sub" / "a").unlink()
    (root / "sub").rmdir()
    (root / "sub").symlink_to(home)
    with pytest.raises(CircuitError, match="through a link"):
        write_all(root, "mine", {"sub/a"}, b"new", overwrite=True)
    with (
        OutputFolder(tmp_path / "root", "other") as folder,
        pytest.raises(CircuitError, match="through a link"),
    ):
        folder.write_bytes("sub/b", b"new")
    assert files_of(home) == {"a": b"precious"}


def test_a_file_that_is_a_link_now_is_refused_and_its_target_stays(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_all(root, "mine", {"a"}, b"old")
    put(tmp_path, "precious", b"precious")
    (root / "a").unlink()
    (root / "a").symlink_to(tmp_path / "precious")
    (root / "b").symlink_to(tmp_path / "precious")
    with OutputFolder(root, "mine", resume=True) as folder:
        for name, said in (("a", "was changed since"), ("b", "was not written by")):
            with pytest.raises(CircuitError, match=said):
                folder.write_bytes(name, b"new")
    assert (root / "a").is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("through", ["link", "."])
def test_a_folder_reached_by_another_name_keeps_what_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    home = tmp_path / "home"
    put(home, "letter", b"precious")
    put(home, "sub/photo", b"precious")
    (tmp_path / "link").symlink_to(home)
    monkeypatch.chdir(home if through == "." else tmp_path)
    for payload in (b"old", b"new"):
        write_all(Path(through), "mine", {"a", "sub/b"}, payload, overwrite=True)
    assert files_of(home) == {
        "letter": b"precious",
        "sub/photo": b"precious",
        "a": b"new",
        "sub/b": b"new",
    }


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "x", b"foreign")
    with (
        pytest.raises(CircuitError, match="is a file; expected a folder"),
        OutputFolder(tmp_path / "x", "mine", overwrite=True),
    ):
        pass
    with (
        pytest.raises(CircuitError, match="cannot be used as output folder"),
        OutputFolder(tmp_path / "x" / "below", "mine"),
    ):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{", '{"command": "other", "files": []}', "{}"])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.manifest.json").write_text(text)
    with (
        pytest.raises(CircuitError, match=r"mine\.manifest\.json.*; move the folder away"),
        OutputFolder(tmp_path, "mine", overwrite=True),
    ):
        pass


def test_two_writers_on_one_folder_the_second_refuses(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, "mine") as first:
        first.write_bytes("a", b"first")
        with (
            pytest.raises(CircuitError, match="another `circuit mine` is writing here"),
            OutputFolder(tmp_path, "mine", overwrite=True),
        ):
            pass
        with OutputFolder(tmp_path, "other"):  # another command shares nothing with it
            pass
    assert files_of(tmp_path) == {"a": b"first"}
    with OutputFolder(tmp_path, "mine", resume=True) as later:
        assert later.owned == ["a"]


def test_files_are_listed_as_ours_before_they_are_written(tmp_path: Path) -> None:
    """So a killed command's files can be replaced by the next one."""
    with OutputFolder(tmp_path, "mine") as folder:
        folder.claim({"a": b"what a killed writer left"})
        assert json.loads((tmp_path / "mine.manifest.json").read_text())["files"] == ["a"]
        with pytest.raises(KeyError):
            folder.path("b")
    put(tmp_path, "a", b"what a killed writer left")
    write_all(tmp_path, "mine", {"a"}, b"new", overwrite=True)
    assert files_of(tmp_path) == {"a": b"new"}


LIMITED = """
import resource, sys
from pathlib import Path
from circuit.artifacts import atomic_write_bytes
from circuit.errors import CircuitError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    atomic_write_bytes(Path(sys.argv[1]), b"n" * 100_000)
except CircuitError as error:
    print(error)
"""


def test_a_file_size_limit_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True
    )
    assert "could not be written (File too large)" in done.stdout
    assert "the previous file, if any, is intact" in done.stdout
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a"
    atomic_write_bytes(path, b"old")
    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
    with pytest.raises(CircuitError, match=r"a: could not be written \(No space left on device\)"):
        atomic_write_bytes(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


def test_a_full_disk_stops_a_log_with_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", SYNC)
    log = RowLog(tmp_path / "rows.jsonl")
    log.append({"step": 1})
    log._handle.close()
    with Path("/dev/full").open("a", encoding="utf-8") as full:
        log._handle = full
        with pytest.raises(CircuitError, match="No space left on device"):
            log.append({"step": 2})
        with pytest.raises(CircuitError, match=r"rows.jsonl: could not be written"):
            log.sync()
        log.close()
    assert read_jsonl(log.path) == [{"step": 1}]


KILLED = """
import hashlib, os, random, signal, sys, time
from pathlib import Path
from circuit.artifacts import atomic_write_bytes
path, least = Path(sys.argv[1]), int(sys.argv[2])
orphan = path.with_name(f".{path.name}.circuit-tmp")
rng = random.Random(1)

def content():
    body = os.urandom(rng.randrange(1, 400_000))
    return hashlib.sha256(body).digest() + body

atomic_write_bytes(path, content())
kills = unreadable = orphans = changed = 0
last = b""
# enough of them within a write, unless the first ones have shown what is to be shown
while kills < least or (not unreadable and min(orphans, changed) < least / 10):
    ready, begun = os.pipe()
    child = os.fork()
    if not child:
        payloads = [content() for _ in range(3)]
        os.write(begun, b".")
        while True:
            for payload in payloads:
                atomic_write_bytes(path, payload)
    os.read(ready, 1)
    time.sleep(0.01 * rng.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(begun)
    kills += 1
    found = path.read_bytes()
    unreadable += hashlib.sha256(found[32:]).digest() != found[:32]
    orphans += orphan.exists()
    changed += found != last
    last = found
atomic_write_bytes(path, content())
print(kills, unreadable, orphans, orphan.exists())
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "state"), "200"],
        capture_output=True,
        text=True,
        check=True,
    )
    kills, unreadable, orphans, orphan_left = done.stdout.split()
    print(f"kills: unreadable {unreadable} of {kills}; within a write {orphans}")
    assert (unreadable, orphan_left) == ("0", "False")


def test_orphaned_temporary_files_are_ignored(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, "mine") as folder:
        folder.write_bytes("step_000001.pt", b"old")
    put(tmp_path, ".step_000001.pt.circuit-tmp", b"half")
    put(tmp_path, ".elsewhere.tmp", b"foreign")
    with OutputFolder(tmp_path, "mine", resume=True) as folder:
        assert folder.owned == ["step_000001.pt"]
        folder.write_bytes("step_000001.pt", b"new")
    assert files_of(tmp_path) == {"step_000001.pt": b"new", ".elsewhere.tmp": b"foreign"}


@pytest.mark.parametrize("place", [".a.circuit-tmp", ".mine.lock", "a"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_nothing_is_written_through_what_stands_in_a_files_place(
    tmp_path: Path, place: str, kind: str
) -> None:
    """Neither is anything else lost, nor does anybody wait."""
    root, precious = tmp_path / "root", tmp_path / "precious"
    root.mkdir()
    precious.write_bytes(b"mine")
    there = root / place
    {
        "link": lambda: there.symlink_to(precious),
        "hard link": lambda: there.hardlink_to(precious),
        "pipe": lambda: os.mkfifo(there),
        "folder": there.mkdir,
    }[kind]()
    with contextlib.suppress(CircuitError), OutputFolder(root, "mine", overwrite=True) as folder:
        folder.write_bytes("a", b"new")
    assert precious.read_bytes() == b"mine"


row_lists = st.lists(
    st.fixed_dictionaries(
        {"step": st.integers(0, 6), "kind": st.text(max_size=4)},
        optional={"loss": st.floats(allow_nan=False, allow_infinity=False)},
    ),
    max_size=8,
).map(lambda rows: sorted(rows, key=lambda row: row["step"]))


@settings(max_examples=40)
@given(rows=row_lists, last_step=st.integers(0, 6), data=st.data())
def test_a_resumed_log_keeps_whole_rows_up_to_its_step(
    rows: list[dict[str, Any]], last_step: int, data: st.DataObject
) -> None:
    """Torn tail dropped, later rows dropped, bytes of the others unchanged, steps unique."""
    lines = [(dump_row(row) + "\n").encode() for row in rows]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    kept, end = [], 0
    for row, line in zip(rows, lines, strict=True):
        end += len(line)
        if end <= cut and row["step"] <= last_step:
            kept.append(row)
    with a_folder() as root:
        path = root / "rows.jsonl"
        path.write_bytes(whole[:cut])
        log = RowLog(path, last_step=last_step)
        assert path.read_bytes() == dump_rows(kept).encode()
        log.append({"step": last_step + 1})
        log.sync()
        log.close()
        assert path.read_bytes() == dump_rows([*kept, {"step": last_step + 1}]).encode()
        assert sum(row["step"] == last_step + 1 for row in read_jsonl(path)) == 1


def test_a_new_log_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\n{"st')
    RowLog(path).close()
    assert path.read_bytes() == b""


def test_damaged_rows_are_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = dump_row({"a": 1})
    for text, line in (
        (f'{good}\n{{"a"', 2),
        ("[1]\n", 1),
        (f"{good}\n\n{good}\n", 2),
        (f'{good}\n{{"a": 1}}\n', 2),
        (good.replace(": 1", ": 2", 1) + "\n", 1),
        ("\xff\n", 1),
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(CircuitError, match=rf"rows\.jsonl:{line}: "):
            read_jsonl(path)
    path.write_text(f"{good}\n{good[:-3]}")
    assert read_jsonl(path, tolerate_torn_tail=True) == [{"a": 1}]
    path.write_text(f"{good[:-3]}\n{good}\n")
    with pytest.raises(CircuitError, match=r"rows\.jsonl:1: "):
        read_jsonl(path, tolerate_torn_tail=True)
    with pytest.raises(CircuitError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_no_flipped_bit_gives_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"kind": "train", "step": step, "loss": 1e-07 / (step + 3), "ok": step % 2 == 0, "é": None}
        for step in range(20)
    ]
    data = dump_rows(rows).encode()
    rng, flips, wrong, harmless = random.Random(0), 1000, 0, 0
    for bit in rng.sample(range(8 * len(data)), flips):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.unlink(missing_ok=True)  # rewriting in place would wait for the disk
        path.write_bytes(flipped)
        line = data[: bit // 8].count(b"\n") + 1
        try:
            found = read_jsonl(path)
        except CircuitError as error:
            wrong += f"rows.jsonl:{line}: " not in str(error)
        else:
            wrong += found != rows
            harmless += found == rows  # 1e-07 and 1E-07 are one number
    print(f"row file: silently wrong {wrong} of {flips} ({harmless} without meaning)")
    assert wrong == 0
    assert harmless < flips / 50


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_hold_no_nan_and_no_infinity(value: float) -> None:
    with pytest.raises(CircuitError, match=rf"terms\.1\.loss is {value} at step 3: .* diverged"):
        dump_row({"step": 3, "terms": [{"loss": 1.0}, {"loss": value}]})


def test_a_refused_command_leaves_no_folder_that_it_has_made(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for root in (tmp_path / "new" / "deep", there / "inner", there):
        with pytest.raises(CircuitError, match="refused"), OutputFolder(root, "report"):
            raise CircuitError("refused")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".report.lock", "there"]
    half = tmp_path / "half"
    with contextlib.suppress(CircuitError), OutputFolder(half, "report") as folder:
        folder.write_text("a", "kept")
        raise CircuitError("refused")
    assert (half / "a").read_text() == "kept"
