"""The plan of a preparation, DIR/plan.json: the input files, numbered tasks, and all settings.

Stages are tasks of which an engine knows only the number (`scan.run_task(out, number)`). A plan is made once: the same command
finds it again, and other settings are refused by name where they would change what was scanned.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lumos_jax.config.fields import flatten_settings
from lumos_jax.data import storage
from lumos_jax.data.base import digest
from lumos_jax.preparation import criteria, joins, scene_shards
from lumos_jax.preparation import settings as prepare_settings
from lumos_jax.preparation.readers import READERS, Input
from lumos_jax.preparation.settings import Prepare, Source

FORMAT = 1
FILE = "plan.json"
# What scan depends on, besides the limits on scores, which may be tightened.
_FROZEN = ("sources", "sample", "sample_inputs", "task_bytes")
_FREE_OF_SOURCES = ("priority", "max_records")


@dataclasses.dataclass(frozen=True)
class Plan:
    """tasks: numbers of inputs each. digest: of inputs, tasks and frozen settings. totals: source -> (input files, bytes)
    before `sample_inputs`."""

    settings: Prepare
    inputs: tuple[Input, ...]
    tasks: tuple[tuple[int, ...], ...]
    digest: str
    totals: Mapping[str, tuple[int, int]]

    @property
    def sources(self) -> dict[str, Source]:
        return {source.label: source for source in self.settings.sources}


def make(out: str, settings: Prepare, say: Callable[[str], None]) -> Plan:
    """Lists the inputs and writes the plan, or finds the one that is there.

    Raises:
      ValueError: a source has no inputs, shards are missing, or the plan that is there is of other settings or inputs.
      OSError: storage fails.
    """
    path = storage.join(out, FILE)
    there = read(out) if storage.exists(path) else None
    if there and (changed := frozen_changes(there.settings, settings)):
        raise ValueError(refusal(out, changed))
    inputs, totals = [], {}
    for source in settings.sources:
        if source.kind == "scenes":
            folder = storage.join(out, "embedded")
            scene_shards.write(folder, source.num_scenes, say)
            source = dataclasses.replace(source, path=folder)
        given = READERS[source.kind].list(source, settings.task_bytes)
        totals[source.label] = len(given), sum(one.bytes for one in given)
        chosen = _sampled(given, settings.sample_inputs)
        inputs += [dataclasses.replace(one, number=len(inputs) + i) for i, one in enumerate(chosen)]
    tasks = tuple(_tasks(inputs, settings.task_bytes))
    made = Plan(settings, tuple(inputs), tasks, _digest(there.settings if there else settings, inputs, tasks), totals)
    if there and there.digest != made.digest:
        raise ValueError(f"{_difference(there.inputs, inputs)} since {path} was written: give another --out")
    for source in settings.sources:
        joins.build(out, source, say)
    if not there:
        storage.write_whole(path, _encoded(made))
    for label, (count, size) in totals.items():
        own = sum(one.source == label for one in inputs)
        say(f"source {label}: {count:,} input files, {size / 1e9:,.3f} GB" + (f"; {own:,} sampled" * (own < count)))
    say(f"plan {made.digest}: {len(tasks):,} tasks in {path}")
    return made


def read(out: str) -> Plan:
    """Raises ValueError: there is none, or it is of another version."""
    path = storage.join(out, FILE)
    try:
        etag = storage.stat(path).etag
    except FileNotFoundError:
        raise ValueError(f"{out} has no {FILE}: run python -m lumos_jax.prepare plan --out={out} first") from None
    return _read(path, etag)


@functools.lru_cache(maxsize=2)
def _read(path: str, etag: str) -> Plan:  # etag: a key of the cache
    try:
        tree = json.loads(storage.read(path))
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}, and this version reads {FORMAT}")
        inputs = [Input(**one | {"part": tuple(one["part"]) if one.get("part") else None}) for one in tree["inputs"]]
        totals = {label: tuple(counts) for label, counts in tree["totals"].items()}
        settings = prepare_settings.from_dict(tree["settings"])
        return Plan(settings, tuple(inputs), tuple(map(tuple, tree["tasks"])), tree["digest"], totals)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used ({error}): remove it, and plan again") from error


def frozen_changes(old: Prepare, new: Prepare) -> dict[str, tuple[Any, Any]]:
    """Settings that were changed and may not be, with both values: a scan depends on them."""
    labels = [tuple(source.label for source in settings.sources) for settings in (old, new)]
    if labels[0] != labels[1]:
        return {"sources": tuple(labels)}
    before, after = _frozen(old), _frozen(new)
    changed = {n: (before.get(n), after.get(n)) for n in before | after if before.get(n) != after.get(n)}
    loose = criteria.loosened(old.criteria, new.criteria)
    return changed | {f"criteria.{n}": (getattr(old.criteria, n), getattr(new.criteria, n)) for n in loose}


def refusal(out: str, changed: Mapping[str, tuple[Any, Any]]) -> str:
    """What to say about `frozen_changes`."""
    text = "; ".join(f"config.{name} was {then!r} and is {now!r}" for name, (then, now) in changed.items())
    return f"{out} was planned with other settings: {text}. Set them back, or give another --out"


def _frozen(settings: Prepare) -> dict[str, Any]:
    tree = prepare_settings.to_dict(settings)
    sources = {source.label: dataclasses.asdict(source) for source in settings.sources}
    kept = {label: {n: v for n, v in one.items() if n not in _FREE_OF_SOURCES} for label, one in sources.items()}
    return flatten_settings({name: kept if name == "sources" else tree[name] for name in _FROZEN})


def _sampled(inputs: list[Input], share: float) -> list[Input]:
    """Those with the lowest hashes of their paths; at least one."""

    def rank(given: Input) -> bytes:
        return hashlib.sha256(repr((given.path, given.part)).encode(errors="surrogateescape")).digest()

    count = max(1, round(share * len(inputs)))
    chosen = sorted(inputs, key=rank)[:count]
    return sorted(chosen, key=lambda given: given.number)


def _tasks(inputs: Iterable[Input], most: int) -> Iterator[tuple[int, ...]]:
    """Consecutive inputs of one source, of about `most` bytes."""
    part: list[Input] = []
    for given in inputs:
        if part and (given.source != part[0].source or sum(one.bytes for one in part) + given.bytes > most):
            yield tuple(one.number for one in part)
            part = []
        part.append(given)
    yield tuple(one.number for one in part)


def _digest(settings: Prepare, inputs: Iterable[Input], tasks: Iterable[tuple[int, ...]]) -> str:
    scores = [(name, getattr(settings.criteria, name)) for name, _ in criteria.SCORE_LIMITS.values()]
    return digest([sorted(_frozen(settings).items()), scores, *map(dataclasses.astuple, inputs), *tasks])


def _encoded(plan: Plan) -> bytes:
    inputs = [{n: v for n, v in dataclasses.asdict(one).items() if n != "part" or v} for one in plan.inputs]
    tree = {"format": FORMAT, "digest": plan.digest, "settings": prepare_settings.to_dict(plan.settings)}
    tree |= {"totals": plan.totals, "tasks": plan.tasks}
    lines = ",\n  ".join(json.dumps(one) for one in inputs)
    return f'{json.dumps(tree, indent=1)[:-2]},\n "inputs": [\n  {lines}\n ]\n}}\n'.encode()


def _difference(old: Iterable[Input], new: Iterable[Input]) -> str:
    """The first input that is new, gone or changed, in words."""
    before, after = ({(one.source, one.path, one.part): one for one in inputs} for inputs in (old, new))
    for key in before | after:
        if before.get(key) != after.get(key):
            what = "is new" if key not in before else "is gone" if key not in after else "changed"
            return f"input {key[1]} {what}"
    return "the list of inputs changed"
