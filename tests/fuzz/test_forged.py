"""Documents whose digests are right and whose values are of any kind: read, or refused in one line.

A digest proves that a file is as somebody wrote it, not that this program did (SECURITY.md).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from law import renewed, typed
from test_flips import MATCH, READ

from circuit.artifacts import ROW_DIGEST, dump_row
from circuit.config import digest_of

Json = dict[str, Any]
VALUES: list[Any] = [None, True, 0, -1, 7, 1.5, 1e308, 10**30, "", "x", "1", "=1+1", "../../x"]
VALUES += ["<script>", [], {}, [[]], {"a": 1}, ["x"] * 3, "L9H9", 12.0]
FORGED = [name for name in READ if name.endswith((".json", "rows.jsonl", "metrics.jsonl"))]


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
    path, sealed = Path(name), '"digest": ' in Path(name).read_text()
    if not name.endswith(".jsonl"):
        document = json.loads(path.read_text())
        changed(document, rng)
        text = json.dumps(digested(document) if sealed else document)
    else:
        lines = path.read_text().splitlines(keepends=True)
        at = rng.randrange(len(lines))
        row = json.loads(lines[at])
        del row[ROW_DIGEST]
        changed(row, rng)
        lines[at] = dump_row(row) + "\n"
        text = "".join(lines)
    path.unlink()
    path.write_text(text)
    if name.startswith(MATCH) and name.endswith(".jsonl"):
        report = Path(f"{MATCH}_report.json")
        document = json.loads(report.read_text())
        document.pop("digest")
        document["sha256"][path.name] = hashlib.sha256(text.encode()).hexdigest()
        report.unlink()
        report.write_text(json.dumps(digested(document)))


@pytest.mark.parametrize("count", [9, pytest.param(1000, marks=pytest.mark.system)])
def test_a_forged_document_is_read_or_refused_in_one_line(
    count: int, place: Path, world: Path
) -> None:
    rng, breaches = random.Random(1), []
    ended: Counter[int] = Counter()
    for number in range(count):
        name = FORGED[number % len(FORGED)]
        words = READ[name][number // len(FORGED) % len(READ[name])]
        renewed(world, place)
        before = Path(name).read_text()
        forge(name, rng)
        done = typed(words)
        ended[done.code] += 1
        if done.breach:
            after = Path(name).read_text() if Path(name).exists() else ""
            at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
            breaches.append(f"{name}: ...{after[max(0, at - 90) : at + 60]}...\n{done.breach}")
    print(
        f"forged: {count} in {len(FORGED)} kinds of file, {ended[2]} refused, {ended[0]} done;"
        f" tracebacks and hangs {len(breaches)}"
    )
    assert breaches == [], "\n\n".join(breaches[:40])
