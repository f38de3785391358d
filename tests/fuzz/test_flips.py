"""A flipped bit, or a changed digit, in any file that a command reads: refused, or no effect.

So is what stands in a file's place: nothing, a part of it, a pipe, a folder, a device, deep JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from law import Ended, differing, files, in_parts, renewed, typed
from wide import READ as WIDE

from circuit.strict_json import parse_json
from circuit.training.checkpoints import read_header

RUN, HALF = "runs/tiny", "runs/half"
CHECKPOINT = f"{RUN}/checkpoints/step_000012.pt"
MATCH = f"{RUN}/analysis/bilinear_qk_match_separation/bilinear_qk_match_separation"
PROBES = f"{RUN}/analysis/probe_set.jsonl"
OUT = ("--output-dir", "out")
TRAIN = ("train", "--config", "tiny.json", "--set", "output_dir=out", "--stop-at-step", "2")
GENERATE = ("generate-benchmark", "--config", "benchmark.json", "--set", "output_dir=out")
RESUME = ("train", "--config", HALF, "--resume")
ANEW = ("train", "--config", RUN, "--resume-from", "9", "--overwrite")
EVALUATE = ("evaluate", "--config", RUN, "--checkpoint", CHECKPOINT)
RECORD = ("trace", "record", "--config", HALF, "--from-initialization", "--num-steps", "2", *OUT)
VERIFY, SHOW = ("trace", "verify", "trace"), ("trace", "show", "trace")
CHECKOUT = ("trace", "checkout", "trace", "--step", "6", "--output", "out.pt")
PAGE = ("page", RUN, "--overwrite")
EXPORT = ("export", "--config", RUN, "--checkpoint", CHECKPOINT, *OUT)
IMPORT = ("import-checkpoints", "exported", "--step", "3", "--benchmark-dir", "data/tiny", *OUT)
SELECT = ("study", "select-heads", "--separation-rows", f"{MATCH}_rows.jsonl", *OUT)
SELECT += ("--start-step", "3", "--end-step", "12", "--score", "rank2")
REPORT = ("bilinear-qk-match-separation", "--config", RUN, "--probe-set", PROBES, "--rank", "2")
REPORT += ("--checkpoint", CHECKPOINT, *OUT)
COMPARE = ("study", "compare-optimizers", "--run", RUN, *OUT)

READ: dict[str, list[tuple[str, ...]]] = {
    "tiny.json": [TRAIN],
    "benchmark.json": [GENERATE],
    f"{RUN}/run_config.json": [EVALUATE, EXPORT, ANEW, COMPARE],
    f"{HALF}/environment.json": [RESUME, RECORD],
    f"{HALF}/train.manifest.json": [RESUME, (*RESUME[:-1], "--overwrite")],
    f"{HALF}/metrics.jsonl": [RESUME],
    f"{RUN}/metrics.jsonl": [PAGE, ANEW, COMPARE],
    f"{HALF}/checkpoints/best.pt": [
        RESUME,
        (*EVALUATE[:2], HALF, "--checkpoint", f"{HALF}/checkpoints/best.pt"),
    ],
    f"{HALF}/checkpoints/step_000006.pt": [RESUME],
    f"{RUN}/summary.json": [COMPARE],
    f"{RUN}/evaluation/best.json": [
        (*EVALUATE[:4], f"{RUN}/checkpoints/best.pt", "--split", "train")
    ],
    CHECKPOINT: [EVALUATE, EXPORT, REPORT],
    "trace/trace.json": [SHOW, VERIFY, CHECKOUT],
    "trace/optimizer_update_trace_rows.jsonl": [SHOW, VERIFY, CHECKOUT],
    "trace/checkpoints/step_000004.pt": [VERIFY, CHECKOUT],
    "data/tiny/metadata.json": [EVALUATE, TRAIN, REPORT],
    "data/tiny/train.jsonl": [TRAIN, VERIFY],
    "data/tiny/validation_iid.jsonl": [EVALUATE, TRAIN],
    PROBES: [REPORT],
    PROBES.replace(".jsonl", ".metadata.json"): [REPORT],
    f"{MATCH}_report.json": [PAGE, SELECT],
    f"{MATCH}_rows.jsonl": [PAGE, SELECT],
    "exported/model.safetensors": [IMPORT],
    "exported/config.json": [IMPORT],
    f"{RUN}/page.formation.manifest.json": [PAGE],
}
"""Commands of every kind of file."""
Outcome = tuple[int, str, dict[str, bytes]]
SAYS = {
    "tiny.json": "out/run_config.json",
    "benchmark.json": "out/metadata.json",
    f"{RUN}/run_config.json": f"{RUN}/run_config.json",
    "exported/model.safetensors": "out/run_config.json",
    "exported/config.json": "out/run_config.json",
    "own/run_config.json": "own/checkpoints/step_000006.pt",
    "edits.jsonl": "out/counterfactual_training_rows.jsonl",
}
"""Where it stands what a command has made of a file whose values are its author's, so no digest."""
SCANNED = {
    "series/step1/config.json": "config_sha256",
    "series/step2/model.safetensors": "parameters_sha256",
}
"""Of these a scan records digests."""


def damaged(data: bytes, rng: random.Random) -> bytes:
    """With one bit flipped, or one digit changed."""
    made = bytearray(data)
    digits = [found.start() for found in re.finditer(rb"\d", data)]
    if digits and rng.random() < 0.5:
        at = rng.choice(digits)
        made[at] = rng.choice([d for d in b"0123456789" if d != data[at]])
    else:
        bit = rng.randrange(8 * len(data))
        made[bit // 8] ^= 1 << bit % 8
    return bytes(made)


HARMS: dict[str, Callable[[Path, bytes, random.Random], object]] = {
    "cut": lambda path, data, rng: path.write_bytes(data[: rng.randrange(len(data))]),
    "empty": lambda path, data, rng: path.touch(),
    "pipe": lambda path, data, rng: os.mkfifo(path),
    "folder": lambda path, data, rng: path.mkdir(),
    "device": lambda path, data, rng: path.symlink_to("/dev/zero"),
    "loop": lambda path, data, rng: path.symlink_to(path.name),
    "deep": lambda path, data, rng: path.write_text("[" * 100_000),
    "digits": lambda path, data, rng: path.write_text(f'{{"seed": {"9" * 5000}}}'),
    "more": lambda path, data, rng: path.write_bytes(data + bytes([rng.randrange(256)])),
}
"""What else becomes of a file."""


def outcome(done: Ended) -> Outcome:
    """Code, words and files of a command."""
    return done.code, re.sub(r"in \d+ s \(.*", "", done.out), files()


def within(said: Any, record: Any) -> bool:
    """Whether a record says at least what a config says, but for the places."""
    if not (isinstance(said, dict) and isinstance(record, dict)):
        return bool(said == record)
    places = ("output_dir", "overrides")
    return all(within(v, record.get(k)) for k, v in said.items() if k not in places)


def on_record(name: str, flipped: bytes) -> bool:
    """Whether what was made tells that it was made of what the file says now."""
    record = Path(SAYS.get(name, ""))
    if not record.is_file():
        return False
    if hashlib.sha256(flipped).hexdigest().encode() in record.read_bytes():
        return True
    lines = flipped.splitlines() if name == "edits.jsonl" else [flipped]
    try:
        said = [parse_json(line) for line in lines]
    except ValueError:
        return False
    if name == "edits.jsonl":
        return {line["label"]: line["edit"] for line in said} == dict(told_edits(record))
    if record.suffix == ".pt":
        made = read_header(record).config.model_dump(mode="json")
    else:
        made = json.loads(record.read_bytes())
    return within(said[0], made.get("config", made))


def told_edits(rows: Path) -> Iterator[tuple[str, Any]]:
    """Labels and edits of the trainings of a report, but for the one that changes nothing."""
    for row in map(json.loads, rows.read_text().splitlines()):
        if row["parts"]:
            yield row["edit"], {"start": row["start_step"], "end": row["end_step"], **row["parts"]}


def content(name: str) -> bytes | None:
    """Of a file; None of what is none."""
    return Path(name).read_bytes() if Path(name).is_file() else None


def verdict(
    name: str, words: tuple[str, ...], flipped: bytes | None, sound: Callable[[], Outcome]
) -> tuple[str, str]:
    """What became of a flip, and why where it is wrong.

    Args:
        flipped: what the file holds; None if it is none.
        sound: what the command does without it; of an empty place.
    """
    done = typed(words)
    code, said, made = outcome(done)
    if done.breach:
        return "wrong", done.breach
    if code in (1, 2):
        return "refused", ""
    untouched = {name} if content(name) == flipped else set()
    recorded = flipped is not None and on_record(name, flipped)  # before `sound` makes all anew
    _, sound_said, sound_made = sound()
    lost = set(differing(sound_made, made)) - untouched
    if not lost and said == sound_said:
        return "without effect", ""
    if name in SCANNED:
        told = re.compile(rf'"{SCANNED[name]}": {{[^}}]*}}'.encode())
        now, then = (told.findall(of["out/series_scan_report.json"]) for of in (made, sound_made))
        recorded = now != then
    return ("on record", "") if recorded else ("wrong", f"{sorted(lost)} {said[-200:]}")


BY_HAND = in_parts((200, part) for part in range(1, 7))


@pytest.mark.parametrize(("count", "part"), [(len(READ) - len(HARMS), 0), *BY_HAND])
def test_a_changed_bit_or_digit_is_refused_or_has_no_effect(
    count: int, part: int, place: Path, world: Path
) -> None:
    def flip(path: Path, data: bytes, rng: random.Random) -> None:
        path.write_bytes(damaged(data, rng))

    first = max(part - 1, 0) * count
    wrong, total = harmed(count, part, first, {"flip": flip}, place, world)
    print(f"flips: silently wrong {len(wrong)} of {count}; {dict(total)}")
    assert wrong == [], "\n\n".join(wrong[:40])


@pytest.mark.parametrize(("count", "part"), [(len(HARMS), 0), *BY_HAND])
def test_what_stands_in_a_files_place_is_refused_or_has_no_effect(
    count: int, part: int, place: Path, world: Path
) -> None:
    wrong, total = harmed(count, part, (part - 1) * count, HARMS, place, world)
    print(f"harms: silently wrong {len(wrong)} of {count}; {dict(total)}")
    assert wrong == [], "\n\n".join(wrong[:40])


def harmed(
    count: int,
    part: int,
    first: int,
    harms: dict[str, Callable[[Path, bytes, random.Random], object]],
    place: Path,
    world: Path,
) -> tuple[list[str], Counter[str]]:
    """Harm as many files, one before each command; what was silently wrong, and the figures.

    Args:
        part: of the long run; 0 is the short one.
        first: number of the first file in a walk over all of them, again and again.
    """
    rng, wrong = random.Random(part), []
    every = READ | WIDE if part else READ
    figures: dict[str, Counter[str]] = {name: Counter() for name in every}

    @cache
    def sound(words: tuple[str, ...]) -> Outcome:
        renewed(world, place)
        done = outcome(typed(words))
        assert done[0] in (0, 130), (words, done[:2])
        return done

    for number in range(count):
        turn, at = divmod(number + first, len(every))
        name = list(every)[at]
        words = every[name][turn % len(every[name])]
        harm = list(harms)[(number + turn) % len(harms)]
        renewed(world, place)
        before = Path(name).read_bytes()
        Path(name).unlink()
        harms[harm](Path(name), before, rng)
        flipped = content(name)
        kind, why = verdict(name, words, flipped, partial(sound, words))
        figures[name][kind] += 1
        if kind == "wrong":
            pairs = enumerate(zip(before, flipped or b"", strict=False))
            byte = next((i for i, (a, b) in pairs if a != b), 0)
            change = [(data or b"")[max(0, byte - 30) : byte + 9] for data in (before, flipped)]
            line = " ".join(words)
            wrong.append(f"{name}, {harm} at {byte}: {change}: circuit {line}\n{why}")
    for name, counts in figures.items():
        print(f"{name}: {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}")
    return wrong, sum(figures.values(), Counter())
