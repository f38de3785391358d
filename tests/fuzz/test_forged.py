"""Documents whose digests are right and whose values are of any kind: read, or refused in one line.

A digest proves that a file is as somebody wrote it, not that this program did (SECURITY.md).
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from law import renewed, typed
from test_flips import BY_HAND, READ
from wide import READ as WIDE

from circuit.artifacts import ROW_DIGEST, dump_row
from circuit.config import digest_of
from circuit.journal import BYTES, read_records

Json = dict[str, Any]
VALUES: list[Any] = [None, True, 0, -1, 7, 1.5, 1e308, 10**30, "", "x", "1", "=1+1", "../../x"]
VALUES += ["<script>", [], {}, [[]], {"a": 1}, ["x"] * 3, "L9H9", 12.0]
ARRAYS = [np.nan, "x", [], [1, 2], [[1.0]], [["a", "b"]], 2**62, [True] * 4, np.zeros((3, 0))]
FORGED = [name for name in READ if name.endswith((".json", "rows.jsonl", "metrics.jsonl"))]
KINDS = (".json", "rows.jsonl", "metrics.jsonl", "edits.jsonl", "replays.jsonl", "examples.jsonl")
KINDS += ("steps.jsonl", "trainings.jsonl", ".journal", ".npz")
FORGED_TOO = [name for name in WIDE if name.endswith(KINDS)]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every value in a document: what holds it, and its key or index there."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    inner = [node[key] for key in keys if isinstance(node[key], dict | list)]
    return [*((node, key) for key in keys), *(one for of in inner for one in places(of))]


def changed(document: Json, rng: random.Random) -> None:
    """One value becomes another, or goes; or one more is there."""
    document.pop("digest", None)
    node, key = rng.choice(places(document))
    if rng.random() < 0.15:
        del node[key]
    elif rng.random() < 0.1 and isinstance(node, dict):
        node[rng.choice(["", "x", "end_step"])] = rng.choice(VALUES)
    else:
        node[key] = rng.choice(VALUES)


def digested(document: Json) -> Json:
    """With a digest of its own, as its kind has it."""
    if "figures" not in document:
        return {**document, "digest": digest_of(document)}
    facts = {key: document.get(key) for key in ("config", "heldout_pairs")}
    splits = document.get("splits")
    pairs = splits.items() if isinstance(splits, dict) else ()
    shas = {name: of.get("sha256") if isinstance(of, dict) else None for name, of in pairs}
    document["figures_sha256"] = digest_of(document["figures"])
    return {**document, "digest": digest_of({**facts, "splits": shas})}


def forge(name: str, rng: random.Random) -> None:
    """Write another document in the place of one, and what holds its digest."""
    path = Path(name)
    if path.suffix in FORGERS:
        data = FORGERS[path.suffix](path, rng)
        path.unlink()
        path.write_bytes(data)
        return
    sealed = '"digest": ' in path.read_text()
    if not name.endswith(".jsonl"):
        document = json.loads(path.read_text())
        changed(document, rng)
        text = json.dumps(digested(document) if sealed else document)
    else:
        lines = path.read_text().splitlines(keepends=True)
        at = rng.randrange(len(lines))
        row = json.loads(lines[at])
        digested_row = row.pop(ROW_DIGEST, None) is not None
        changed(row, rng)
        lines[at] = (dump_row(row) if digested_row else json.dumps(row)) + "\n"
        text = "".join(lines)
    path.unlink()
    path.write_text(text)
    for report in path.parent.glob("*_report.json") if name.endswith(".jsonl") else ():
        document = json.loads(report.read_text())
        document.pop("digest")
        document["sha256"][path.name] = hashlib.sha256(text.encode()).hexdigest()
        report.unlink()
        report.write_text(json.dumps(digested(document)))


def forged_journal(path: Path, rng: random.Random) -> bytes:
    """A recording's records, the line of one of them changed."""
    data = path.read_bytes()
    records = [(line, data[at : at + line[BYTES]]) for line, at in read_records(path)]
    changed(rng.choice(records)[0], rng)
    return b"".join((dump_row(line) + "\n").encode() + behind for line, behind in records)


def forged_arrays(path: Path, rng: random.Random) -> bytes:
    """A file of arrays, one of them another, gone, or one more."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    name = rng.choice([*arrays, "x"])
    arrays.pop(name, None)
    if rng.random() < 0.9:
        arrays[name] = np.array(rng.choice(ARRAYS))
    payload = io.BytesIO()
    np.savez(payload, **arrays)
    return payload.getvalue()


FORGERS = {".journal": forged_journal, ".npz": forged_arrays}


@pytest.mark.parametrize(("count", "part"), [(9, 0), *BY_HAND])
def test_a_forged_document_is_read_or_refused_in_one_line(
    count: int, part: int, place: Path, world: Path
) -> None:
    rng, breaches = random.Random(part + 1), []
    ended: Counter[int] = Counter()
    every = {name: (READ | WIDE)[name] for name in (FORGED + FORGED_TOO if part else FORGED)}
    for number in range(count):
        turn, at = divmod(number + max(part - 1, 0) * count, len(every))
        name = list(every)[at]
        words = every[name][turn % len(every[name])]
        renewed(world, place)
        before = Path(name).read_bytes()
        forge(name, rng)
        done = typed(words)
        ended[done.code] += 1
        if done.breach:
            after = Path(name).read_bytes() if Path(name).exists() else b""
            at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
            breaches.append(f"{name}: ...{after[max(0, at - 90) : at + 60]!r}...\n{done.breach}")
    print(
        f"forged: {count} in {len(every)} kinds of file, {ended[2]} refused, {ended[0]} done;"
        f" tracebacks and hangs {len(breaches)}"
    )
    assert breaches == [], "\n\n".join(breaches[:40])
