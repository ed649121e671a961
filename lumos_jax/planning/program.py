"""Reads a compiled program's text (HLO): the compiler's estimate of cycles, and the bytes of collectives.

An instruction counts once for each time that it runs: the body of a loop as often as the constant that its condition compares
the loop's counter with. Instructions of a fusion or a called computation run where it is called.

Bytes are what one chip must receive at least, by the definition of each operation over n chips and whole arrays of size S:

    all-gather        (n - 1) / n S     S the result
    reduce-scatter    (n - 1) / n S     S the operand
    all-reduce      2 (n - 1) / n S
    all-to-all        (n - 1) / n S
    collective-permute            S
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_OPERAND = re.compile(r" [a-z\-]+-(?:update|done)\([^%]*%([\w.\-]+)")  # the first, of what follows a start
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCH = re.compile(r"(?:branch_computations=\{|true_computation=|false_computation=)%?([\w.\-]+)")


class Collective(NamedTuple):
    """One kind of collective in one run of a program."""

    count: int
    received: float  # bytes that a chip receives at least
    exposed: float  # those of collectives that are not asynchronous, beside which nothing is computed; see Overlapped


class Overlapped(NamedTuple):
    """A collective that something else runs beside."""

    count: int
    received: float  # bytes that a chip receives in one run at least
    cycles: float  # that the compiler estimates between its start and its end, or for the fusions that it is part of


class Kernel(NamedTuple):
    """A kernel of ours, whose time the compiler does not estimate."""

    count: int
    flops: float  # of one run, as the kernel declares them
    bytes: float  # likewise, of memory traffic


@dataclasses.dataclass(frozen=True)
class Program:
    """What the text of a compiled program says."""

    cycles: int  # the compiler's estimate for one run on one chip, without collectives and kernels; 0 if it has none
    collectives: Mapping[str, Collective]  # by kind
    trips: Mapping[
        str, int | None
    ]  # of each loop's body, by its name; None if the text does not say, which counts as once
    kernels: Sequence[Kernel] = ()  # in the order of the text
    overlapped: Sequence[Overlapped] = ()  # likewise

    @property
    def received(self) -> float:
        return sum(kind.received for kind in self.collectives.values())

    @property
    def exposed(self) -> float:
        return sum(kind.exposed for kind in self.collectives.values())


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    line: str


def read_program(text: str, chips: int) -> Program:
    """What the text from `compiled.as_text()` says of a program that runs on so many chips. Raises ValueError for others."""
    return _Reader(text, chips).run()


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """{name: instructions} and the name of the entry. Raises ValueError if there is none."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (made := _INSTRUCTION.match(line)):
            current.append(_Instruction(*made.groups(), line))
    if not entry:
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    return found, entry


def size_of(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple, as HLO writes its shape: "(bf16[8,128]{1,0}, f32[])" -> 2052.

    Tokens and opaque values have no size.
    """
    total = 0.0
    for kind, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", shape):
        bits = re.match(r"[a-z]+(\d+)", "u8" if kind == "pred" else kind)
        total += int(bits[1]) / 8 * math.prod(int(dim) for dim in dims.split(",") if dim) if bits else 0
    return total


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, which may be tuples."""
    found, depth, begin = [], 0, 1
    for at, sign in enumerate(shape):
        depth += (sign in "([{") - (sign in ")]}")
        if (sign == "," and depth == 1) or depth == 0:
            found.append(shape[begin:at].strip())
            begin = at + 1
    return found


def group_size(line: str, chips: int) -> int:
    """How many chips take part in a collective, from its replica_groups; all of them if it has none."""
    if named := re.search(r"replica_groups=@?mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'?([\w.]+)'?", named[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    return chips


def _trip_count(body: _Instruction, condition: list[_Instruction]) -> int | None:
    """How often a loop runs: its known_trip_count, or the constant that its condition compares a counter from 0 with."""
    if known := re.search(r'known_trip_count":\{"n":"?(\d+)', body.line):
        return int(known[1])
    constants = {one.name: int(n[1]) for one in condition if (n := re.search(r" constant\((\d+)\)", one.line))}
    limits = list(constants.values())
    for one in condition:
        if one.opcode == "compare" and "direction=LT" in one.line:
            operands = re.search(r" compare\((.*?)\)", one.line)[1]
            limits = [constants[name] for name in re.findall(r"([\w.\-]+)(?:,|$)", operands) if name in constants]
            break
    return limits[0] if len(limits) == 1 else None


class _Reader:
    """Walks the computations from the entry on, and adds up."""

    def __init__(self, text: str, chips: int):
        self._computations, self._entry = _computations(text)
        self._chips = chips
        self.cycles = 0
        self.trips: dict[str, int | None] = {}
        self._kernels: list[Kernel] = []
        self._overlapped: dict[tuple, list[float]] = {}
        self._moved: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
        self._seen: set[tuple] = set()

    def run(self) -> Program:
        self._visit(self._entry, 1, owner=self._entry)
        collectives = {kind: Collective(*sums) for kind, sums in sorted(self._moved.items())}
        overlapped = tuple(Overlapped(*one) for one in self._overlapped.values())
        return Program(self.cycles, collectives, self.trips, tuple(self._kernels), overlapped)

    def _visit(self, name: str, times: int, owner: str, costed: int | None = None, asynchronous: bool = False) -> None:
        """owner: the entry or the loop body that this runs in; costed: cycles of the fusion that it is a part of, whose
        estimate covers it; asynchronous: it runs beside what follows, as on a TPU's SparseCore."""
        started: dict[str, tuple[list[tuple], int]] = {}  # collectives that run, and the cycles before them
        for one in self._computations.get(name, []):
            cycles = int(found[1]) if (found := _CYCLES.search(one.line)) else 0
            if costed is None:
                self.cycles += cycles * times
            if "tpu_custom_call" in one.line and (said := _COST.search(one.line)):
                self._kernels.append(Kernel(times, float(said[1]), float(said[2])))
            kind, known = one.opcode.removesuffix("-start"), len(self._overlapped)
            if one.opcode == "while":
                body, condition = (re.search(rf"{role}=%?([\w.\-]+)", one.line)[1] for role in ("body", "condition"))
                self.trips[body] = _trip_count(one, self._computations.get(condition, []))
                self._visit(body, times * (self.trips[body] or 1), f"{owner}/{one.name}", costed)
            elif kind in _KINDS:
                self._collective(kind, one, name, times, owner, costed, asynchronous or one.opcode != kind)
            else:
                beside = one.opcode in ("async-start", "call-start")
                inside = cycles if costed is None and (beside or one.opcode == "fusion") else costed
                for called in self._called(one):
                    self._visit(called, times, owner, inside, asynchronous or beside)
            if one.opcode.endswith("-start"):
                started[one.name] = (list(self._overlapped)[known:], self.cycles)
            elif first := _OPERAND.search(one.line):
                keys, before = started.pop(first[1], ([], 0))
                if one.opcode.endswith("-update"):  # brings the operands, before which nothing was sent
                    started[one.name] = (keys, self.cycles)
                else:
                    for key in keys:
                        self._overlapped[key][2] += (self.cycles - before) / times

    @staticmethod
    def _called(one: _Instruction) -> Iterator[str]:
        if one.opcode == "conditional":  # one of them runs; the first is taken
            yield from _BRANCH.findall(one.line)[:1]
        elif one.opcode in ("fusion", "call", "async-start", "call-start", "custom-call"):
            yield from _CALLED.findall(one.line)

    def _collective(
        self, kind: str, one: _Instruction, within: str, times: int, owner: str, costed: int | None, asynchronous: bool
    ) -> None:
        """within: the computation that it stands in; costed: cycles of the fusion that this is, which computes meanwhile."""
        # A reduce-scatter is a fusion of an all-reduce and its slice, which computes nothing else.
        inside = costed is not None and not asynchronous
        fused = inside and not within.startswith("all-reduce-scatter")
        # TPUs split a collective into pieces inside several fusions, which share its channel. On GPUs whole ones may share it.
        channel = re.search(r"channel_id=(\d+)", one.line)
        chain = re.search(r'chain_id="(\d+)"', one.line)  # distinguishes those that `shard_map` gave one channel
        pieces = channel and (inside or (chain and one.opcode != kind))
        key = (owner, kind, channel[1], chain and chain[1]) if pieces else (owner, kind, one.name)
        if key in self._seen:
            if fused and key in self._overlapped:  # not if its first piece was a reduce-scatter
                self._overlapped[key][2] += costed
            return
        self._seen.add(key)
        n = group_size(one.line, self._chips)
        if one.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, and on some chips contexts)
            operands, results = _elements(one.shape)[:2]
            whole = size_of(operands if kind == "reduce-scatter" else results)
        else:
            whole = size_of(one.shape) * (n if kind == "reduce-scatter" else 1)
        if kind == "all-reduce" and self._only_sliced(one, self._computations[within]):
            kind = "reduce-scatter"
        share = 1.0 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
        received = share * whole * times
        if asynchronous or fused:
            self._overlapped[key] = [times, share * whole, costed if fused else 0]
        sums = zip(self._moved[kind], (times, received, 0.0 if asynchronous or fused else received), strict=True)
        self._moved[kind] = [before + more for before, more in sums]

    @staticmethod
    def _only_sliced(one: _Instruction, around: list[_Instruction]) -> bool:
        """Whether only a slice of an all-reduce is used, within a fusion: how TPUs write reduce-scatter."""
        users = [other for other in around if re.search(rf"%{re.escape(one.name)}[,)]", other.line.split(" = ", 1)[-1])]
        return bool(users) and all(other.opcode == "dynamic-slice" for other in users)
