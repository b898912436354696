"""The PTX memory consistency model: a checker that enumerates the executions of small programs.

Names and section numbers are those of the PTX ISA manual, chapter 8, "Memory Consistency Model". A
program is a few threads of straight-line PTX over named locations of one word each. An execution
chooses, for every read, the write it reads from; an order of the morally strong writes to each
location; and an order of the sc fences. An execution is allowed if no axiom (8.10) refuses it.

What the manual leaves to the reader is decided as follows.

- A barrier is an arrival and a wait: the arrivals of a generation synchronize with its waits
  (8.9.4, items 2 and 3), or else two threads at a barrier would each precede the other.
- A loop that waits for a value is its last iteration. The earlier ones only read: an execution
  without them is allowed whenever one with them is.
- Observation order (8.9.2) passes through reductions as through other atomic operations, although
  8.4 does not count ``red`` among the reads. ``reductions_pass_on=False`` is the other reading.
- A bulk copy writes through the async proxy, then performs complete-tx on its mbarrier through the
  generic proxy, with release semantics at cluster scope. The write is ordered after prior
  instructions of the issuing thread; complete-tx passes on that write alone, no earlier instruction
  (8.9.1.1). Completion is followed by an implicit proxy fence (section "cp.async.bulk").
- Proxy-preserved base causality order (8.9.5) names no rule for ``fence.proxy.async``. It is taken
  like an alias fence: between the generic and the async proxy, a proxy fence of the block that
  copies has to stand along the path.
- ``bar.warp.sync`` orders memory among the threads of a warp, as its section says.

Not modelled: operations that overlap partly (8.7.2; hence no single-copy atomicity), aliases,
textures, system scope as distinct from gpu.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ORDERS = ("relaxed", "acquire", "release", "acq_rel", "sc")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_MODELLED = re.compile(
    r"(ld|st)\.(?!async|bulk|mmio|param|local|const)[\w.:]*( of mapa)?|"
    r"(atom|red)\.(?!async)[\w.:]*|"
    r"fence\.(sc|acq_rel|acquire|release)\.\w+|fence\.proxy\.async(\.shared::cta)?|"
    r"fence\.mbarrier_init\.release\.cluster|"
    r"bar\.(sync|arrive|warp\.sync)|barrier\.sync|"
    r"barrier\.cluster\.(arrive(\.release|\.relaxed)?|wait(\.acquire)?)(\.aligned)?|"
    r"mbarrier\.(init|arrive|try_wait)[\w.:]*|"
    r"cp\.async\.c[ag]\.shared\.global|cp\.async\.commit_group|cp\.async\.wait_group \d+|"
    r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes"
)
_NO_WRITE = object()


@dataclass(frozen=True)
class Instruction:
    """One PTX instruction.

    ``value``: what a store writes, a constant or a function of the thread's registers; of an atomic
    operation or an mbarrier, a function of the old value. ``until``: of a loop's last read, what
    the value satisfies. ``mbarrier`` and ``complete``: of a bulk copy, the location on which
    complete-tx is performed, and the function that it is.
    """

    opcode: str
    place: str = ""
    value: Any = None
    register: str = ""
    until: Callable[[Any], bool] | None = None
    mbarrier: str = ""
    complete: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Thread:
    instructions: Sequence[Instruction]
    block: int = 0
    cluster: int = 0
    warp: int = 0


@dataclass(frozen=True)
class Program:
    """``initial``: values before any thread starts, 0 where not given (8.2.6)."""

    threads: Sequence[Thread]
    initial: Mapping[str, Any] = field(default_factory=dict)


class NeverEnds(ValueError):
    """A thread waits for a barrier that others never reach."""


@dataclass(eq=False)
class Event:
    """A memory operation or a memory fence (8.4). Its position in base causality order is a pair of
    nodes: ``before``, at which order arrives, and ``after``, from which it goes on."""

    opcode: str
    thread: Thread
    in_program_order: bool
    before: int
    after: int
    place: str = ""
    reads: bool = False
    value: Any = _NO_WRITE
    order: str = "weak"
    scope: str = ""
    proxy: str = "generic"
    register: str = ""
    until: Callable[[Any], bool] | None = None

    @property
    def writes(self) -> bool:
        return self.value is not _NO_WRITE

    @property
    def atomic(self) -> bool:
        return self.reads and self.writes

    @property
    def acquires(self) -> bool:
        return self.order in ("acquire", "acq_rel", "sc")

    @property
    def releases(self) -> bool:
        return self.order in ("release", "acq_rel", "sc")

    def __repr__(self) -> str:
        return f"{self.opcode} [{self.place}] of block {self.thread.block}"


def _semantics(opcode: str) -> tuple[str, str]:
    """Order and scope as written, or as the manual says of an instruction without."""
    words = opcode.split(".")
    order = next((w for w in words if w in _ORDERS), "")
    scope = next((w for w in words if w in _SCOPES), "")
    defaults = {
        "ld": ("relaxed", "sys") if "volatile" in words else ("weak", ""),
        "st": ("relaxed", "sys") if "volatile" in words else ("weak", ""),
        "atom": ("relaxed", "gpu"),
        "red": ("relaxed", "gpu"),
        "fence": ("acq_rel", ""),
        "mbarrier": ("acquire" if "wait" in opcode else "release", "cta"),
    }[words[0]]
    return order or defaults[0], scope or defaults[1]


def _includes(event: Event, other: Event) -> bool:
    """Whether the scope of an operation includes the thread that executes another (8.5)."""
    here, there = event.thread, other.thread
    if event.scope in ("cta", "cluster") and here.cluster != there.cluster:
        return False
    return event.scope != "cta" or here.block == there.block


def morally_strong(a: Event, b: Event) -> bool:
    """8.7."""
    in_program_order = a.thread is b.thread and a.in_program_order and b.in_program_order
    both_strong = "weak" not in (a.order, b.order) and _includes(a, b) and _includes(b, a)
    same_place = not (a.place and b.place) or a.place == b.place
    return (in_program_order or both_strong) and a.proxy == b.proxy and same_place


class _Candidate:
    """What is the same in all executions of a program."""

    def __init__(self, program: Program) -> None:
        self.initial = program.initial
        self.events: list[Event] = []
        self.edges: list[tuple[int, int]] = []
        self.nodes = 0
        self.proxy_fences: list[tuple[int, int]] = []  # node, block
        arrivals: dict[Any, list[int]] = defaultdict(list)
        waits: dict[Any, list[int]] = defaultdict(list)
        for thread in program.threads:
            self._thread(thread, arrivals, waits)
        for generation, nodes in waits.items():
            if not arrivals[generation]:
                raise NeverEnds(f"nobody arrives at {generation}")
            self.edges += itertools.product(arrivals[generation], nodes)
        self.reach = self._closure()
        self.memory = [e for e in self.events if e.place]
        self.at: dict[str, list[Event]] = defaultdict(list)
        for event in self.memory:
            self.at[event.place].append(event)
        self.position = {id(e): i for i, e in enumerate(self.events)}
        self.releases, self.acquires = self._patterns()
        depends = any(callable(e.value) and not e.atomic for e in self.memory)
        #: Locations that take part in synchronization, or whose values go further.
        self.core = [p for p, events in self.at.items()
                     if depends or any(e.order != "weak" for e in events)]  # fmt: skip

    def _node(self, *predecessors: int) -> int:
        self.edges += [(p, self.nodes) for p in predecessors]
        self.nodes += 1
        return self.nodes - 1

    def _thread(self, thread: Thread, arrivals: Any, waits: Any) -> None:
        counts: dict[Any, int] = defaultdict(int)
        copies: list[int] = []  # of cp.async, not yet in a group
        groups: list[list[int]] = []
        last = self._node()
        for i in thread.instructions:
            opcode = i.opcode
            if not _MODELLED.fullmatch(opcode):
                raise ValueError(f"{opcode} is not modelled")
            if opcode.startswith(("bar.", "barrier.")):
                within = (thread.cluster if "cluster" in opcode else thread.block,
                          thread.warp if "warp" in opcode else None)  # fmt: skip
                name = ("cluster" if "cluster" in opcode else "warp" if "warp" in opcode
                        else f"barrier {i.place}", *within)  # fmt: skip
                arrives, waited = ".wait" not in opcode, ".arrive" not in opcode
                if arrives:
                    last = self._node(last)
                    key = (*name, counts[name, "arrive"])
                    counts[name, "arrive"] += 1
                    if "relaxed" in opcode:  # is counted, and orders nothing
                        arrivals[key].append(self._node())
                    else:
                        arrivals[key].append(last)
                if waited:
                    last = self._node(last)
                    waits[(*name, counts[name, "wait"])].append(last)
                    counts[name, "wait"] += 1
            elif opcode.startswith("cp.async.bulk"):
                last = self._node(last)
                copied = self._node()
                self._event(i, thread, False, self._node(last), copied, proxy="async")
                fence = self._node(copied)
                self.proxy_fences.append((fence, thread.block))
                self.events.append(Event(
                    "complete-tx", thread, False, self._node(last), self._node(fence), i.mbarrier,
                    True, i.complete, "release", "cluster"))  # fmt: skip
            elif opcode.startswith("cp.async.commit"):
                groups.append(copies)
                copies = []
            elif opcode.startswith("cp.async.wait_group"):
                last = self._node(last)
                pending = int(opcode.split()[-1])
                done = groups[: len(groups) - pending]
                self.edges += [(copy, last) for group in done for copy in group]
            elif opcode.startswith("cp.async"):
                copied = self._node()
                self._event(i, thread, False, self._node(last), copied)
                copies.append(copied)
            elif opcode.startswith(("fence.proxy.async", "fence.mbarrier_init")):
                last = self._node(last)
                if "proxy" in opcode:
                    self.proxy_fences.append((last, thread.block))
            else:
                last = self._node(last)
                self._event(i, thread, True, last, last)

    def _event(self, i: Instruction, thread: Thread, in_order: bool, before: int, after: int,
               proxy: str = "generic") -> None:  # fmt: skip
        kind = i.opcode.partition(".")[0]
        order, scope = ("weak", "")
        if not i.opcode.startswith(("cp.", "mbarrier.init")):
            order, scope = _semantics(i.opcode)
        what = ".".join(i.opcode.split(".")[:2]) if kind == "mbarrier" else kind
        reads = what in ("ld", "atom", "red", "mbarrier.arrive", "mbarrier.try_wait")
        writes = what in ("st", "atom", "red", "cp", "mbarrier.arrive", "mbarrier.init")
        value = i.value if writes else _NO_WRITE
        self.events.append(Event(i.opcode, thread, in_order, before, after, i.place, reads, value,
                                 order, scope, proxy, i.register, i.until))  # fmt: skip

    def _closure(self) -> list[int]:
        reach = [0] * self.nodes
        for a, b in self.edges:
            reach[a] |= 1 << b
        for k in range(self.nodes):
            for i in range(self.nodes):
                if reach[i] >> k & 1:
                    reach[i] |= reach[k]
        return reach

    def program_order(self, a: Event, b: Event) -> bool:
        """8.9.1."""
        return (a.thread is b.thread and a.in_program_order and b.in_program_order
                and self.position[id(a)] < self.position[id(b)])  # fmt: skip

    def _patterns(self) -> tuple[list[tuple[Event, Event]], list[tuple[Event, Event]]]:
        """8.8: release patterns as their first operation and the write, acquire patterns as the
        read and their last operation."""
        releases, acquires = [], []
        strong = [e for e in self.memory if e.order != "weak"]
        for e in self.events:
            same = [s for s in strong if s.place == e.place or not e.place]
            if e.releases:
                releases += [(e, e)] if e.writes else []
                releases += [(e, w) for w in same if w.writes and self.program_order(e, w)]
            if e.acquires:
                acquires += [(e, e)] if e.reads else []
                acquires += [(r, e) for r in same if r.reads and not r.opcode.startswith("red")
                             and self.program_order(r, e)]  # fmt: skip
        return releases, acquires


@dataclass
class Execution:
    """One that is allowed. ``registers``: what was read of locations that take part in
    synchronization. ``choices``: what each other register may hold, of one read independently of
    the others. ``races``: pairs in a data-race (8.7.1)."""

    registers: dict[str, Any]
    choices: dict[str, set[Any]]
    races: list[tuple[Event, Event]]

    def values(self, register: str) -> set[Any]:
        return self.choices.get(register) or {self.registers[register]}


class _ThinAir(Exception):
    pass


class _Unknown(Exception):
    pass


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _is_acyclic(after: Mapping[int, int], mask: int) -> bool:
    """Of a relation on the events in ``mask``: what follows each."""
    while mask:
        last = sum(1 << i for i in _bits(mask) if not after[i] & mask)
        if not last:
            return False
        mask ^= last
    return True


class _Search:
    """Events are numbers here, sets of events masks of bits, and relations lists of masks: of what
    follows each event."""

    def __init__(self, program: Program, reductions_pass_on: bool) -> None:
        self.c = c = _Candidate(program)
        self.events = c.events
        self.reductions_pass_on = reductions_pass_on
        numbers = range(len(c.events))
        self.strong = [
            sum(1 << j for j in numbers if i != j and morally_strong(c.events[i], c.events[j]))
            for i in numbers
        ]
        self.order = [sum(1 << j for j in numbers if c.program_order(c.events[i], c.events[j]))
                      for i in numbers]  # fmt: skip
        self.at = {place: [c.position[id(e)] for e in events] for place, events in c.at.items()}
        self.writes = {place: sum(1 << i for i in at if c.events[i].writes)
                       for place, at in self.at.items()}  # fmt: skip
        number = c.position
        self.releases = [(number[id(a)], number[id(b)]) for a, b in c.releases]
        self.acquires = [(number[id(a)], number[id(b)]) for a, b in c.acquires]
        self.source: dict[int, int | None] = {}  # None: the initial write
        self.reach = c.reach
        self.cause = self.causality()
        self.first_cause = self.cause

    # ---- causality order, 8.9.5 ----

    def base(self, a: int, b: int) -> int:
        return self.reach[self.events[a].after] >> self.events[b].before & 1

    def proxy_preserved(self, a: int, b: int) -> bool:
        """Of operations on the same location."""
        if not self.base(a, b):
            return False
        first, second = self.events[a], self.events[b]
        if first.proxy == second.proxy:
            return first.proxy == "generic" or first.thread.block == second.thread.block
        copier = (first if first.proxy == "async" else second).thread.block
        return any(block == copier and self.reach[first.after] >> node & 1
                   and self.reach[node] >> second.before & 1
                   for node, block in self.c.proxy_fences)  # fmt: skip

    def observed(self, read: int) -> Iterator[int]:
        """The writes that precede a read in observation order, 8.9.2."""
        write = self.source.get(read)
        while write is not None and self.strong[read] >> write & 1:
            yield write
            event = self.events[write]
            if not event.atomic or (event.opcode.startswith("red") and not self.reductions_pass_on):
                return
            read, write = write, self.source.get(write)

    def causality(self) -> list[int]:
        cause = [0] * len(self.events)
        for at in self.at.values():
            for a in at:
                cause[a] = sum(1 << b for b in at if a != b and self.proxy_preserved(a, b))
            preserved = {a: cause[a] for a in at}
            for z in at:
                if preserved[z] and z in self.source:
                    for x in self.observed(z):
                        cause[x] |= preserved[z] & ~(1 << x)
        return cause

    def synchronize(self, fences: Sequence[int]) -> None:
        """8.9.4, items 1 and 4, on top of what barriers order."""
        edges = [(a, b) for a, b in itertools.combinations(fences, 2) if self.strong[a] >> b & 1]
        for read, last in self.acquires:
            seen = set(self.observed(read))
            edges += [(first, last) for first, write in self.releases
                      if write in seen and self.strong[first] >> last & 1]  # fmt: skip
        self.reach = list(self.c.reach)
        for a, b in edges:
            source, sink = self.events[a].after, self.events[b].before
            more = self.reach[sink] | 1 << sink
            for i in range(self.c.nodes):
                if i == source or self.reach[i] >> source & 1:
                    self.reach[i] |= more
        self.cause = self.causality()

    # ---- values ----

    def value(self, write: int | None, place: str, busy: tuple[int, ...] = ()) -> Any:
        if write is None:
            return self.c.initial.get(place, 0)
        event = self.events[write]
        if not callable(event.value):
            return event.value
        if write in busy:  # 8.10.4, No Thin Air
            raise _ThinAir
        busy = (*busy, write)
        if event.atomic:
            return event.value(self.read(write, busy))
        registers = {e.register: i for i, e in enumerate(self.events)
                     if e.thread is event.thread and e.register}  # fmt: skip

        class Registers:
            def __getitem__(_, name: str) -> Any:
                return self.read(registers[name], busy)

        return event.value(Registers())

    def read(self, read: int, busy: tuple[int, ...] = ()) -> Any:
        if read not in self.source:
            raise _Unknown
        return self.value(self.source[read], self.events[read].place, busy)

    def ends_here(self, read: int) -> bool:
        """Whether a loop's last read may be this one, as far as values are known."""
        until = self.events[read].until
        try:
            return until is None or until(self.read(read))
        except _Unknown:
            return True

    # ---- coherence order, 8.9.6, and communication order, 8.9.7 ----

    def coherence(self, place: str, chosen: Mapping[int, int]) -> dict[int, int] | None:
        """Of the morally strong writes as chosen, of the others by causality; None: a cycle, which
        axiom Coherence (8.10.1) refuses."""
        writes = self.writes[place]
        after = {w: chosen.get(w, 0) | (self.cause[w] & writes) for w in _bits(writes)}
        for k, i in itertools.product(after, after):
            if after[i] >> k & 1:
                after[i] |= after[k]
        return None if any(after[w] >> w & 1 for w in after) else after

    def is_coherent(self, place: str, coherence: Mapping[int, int]) -> bool:
        """8.10.5, Sequential Consistency Per Location, and 8.10.3, Atomicity, as far as reads have
        their sources."""
        events = self.at[place]
        mask = sum(1 << i for i in events)
        communicates = {i: coherence.get(i, 0) for i in events}
        for i in events:
            if i in self.source:
                source = self.source[i]
                if source is not None:
                    communicates[source] |= 1 << i
                overwritten = self.writes[place] if source is None else coherence[source]
                communicates[i] |= overwritten & ~(1 << i)
                if self.events[i].writes and any(
                    coherence[w] >> i & 1 for w in _bits(overwritten & self.strong[i])
                ):
                    return False
        before = {i: (self.order[i] | (self.strong[i] & communicates[i])) & mask for i in events}
        return _is_acyclic(before, mask)

    def may_read(
        self, read: int, write: int | None, place: str, coherence: Mapping[int, int]
    ) -> bool:
        """8.10.6, Causality."""
        if write == read or (write is not None and self.cause[read] >> write & 1):
            return False
        later = self.writes[place] if write is None else coherence[write]
        return not any(self.cause[w] >> read & 1 for w in _bits(later & ~(1 << read)))

    # ---- the search ----

    def orders(self, place: str) -> Iterator[dict[int, int]]:
        """Every order of the morally strong writes to a location."""
        fixed = self.coherence(place, {})
        if fixed is None:
            return
        writes = list(fixed)
        pairs = [(a, b) for a, b in itertools.combinations(writes, 2) if self.strong[a] >> b & 1]

        def choose(left: int, after: dict[int, int]) -> Iterator[dict[int, int]]:
            if left == len(pairs):
                yield after
                return
            a, b = pairs[left]
            for x, y in ((a, b), (b, a)):
                if after[y] >> x & 1:
                    continue
                more = after[y] | 1 << y
                yield from choose(left + 1, {w: m | more if w == x or m >> x & 1 else m
                                             for w, m in after.items()})  # fmt: skip

        yield from choose(0, fixed)

    def sources(self, reads: Sequence[int], coherence: Mapping[str, Any]) -> Iterator[None]:
        """Every choice of writes to read from, as far as barriers and program order tell."""
        if not reads:
            yield
            return
        read, place = reads[0], self.events[reads[0]].place
        for write in (*_bits(self.writes[place]), None):
            # Found anew: executions in between have changed it.
            self.cause = self.first_cause
            if not self.may_read(read, write, place, coherence[place]):
                continue
            self.source[read] = write
            try:
                if self.ends_here(read) and self.is_coherent(place, coherence[place]):
                    yield from self.sources(reads[1:], coherence)
            except _ThinAir:
                pass
            del self.source[read]

    def executions(self) -> Iterator[Execution]:
        events, core = self.events, self.c.core
        fences = [i for i, e in enumerate(events) if not e.place and e.order == "sc"]
        # Atomic operations first: their values decide which reads end a loop.
        reads = sorted((i for place in core for i in self.at[place] if events[i].reads),
                       key=lambda i: (not events[i].atomic, i))  # fmt: skip
        for chosen in itertools.product(*map(list, map(self.orders, core))):
            coherence = dict(zip(core, chosen, strict=True))
            for _ in self.sources(reads, coherence):
                for order in itertools.permutations(fences):
                    if found := self.complete(order, coherence):
                        yield found

    def complete(self, fences: Sequence[int], chosen: Mapping[str, Any]) -> Execution | None:
        """The execution with causality order as it is at last, if all axioms allow it."""
        self.synchronize(fences)
        if any(self.reach[i] >> i & 1 for i in range(self.c.nodes)):
            return None
        # 8.10.2, Fence-SC.
        if any(self.base(b, a) for a, b in itertools.combinations(fences, 2)
               if self.strong[a] >> b & 1):  # fmt: skip
            return None
        registers: dict[str, Any] = {}
        choices: dict[str, set[Any]] = {}
        for place, at in self.at.items():
            coherence = self.coherence(place, chosen.get(place, {}))
            if coherence is None or (place in chosen and not self.is_coherent(place, coherence)):
                return None
            for read in (i for i in at if self.events[i].reads):
                name = self.events[read].register
                if place in chosen:
                    try:
                        allowed = (self.may_read(read, self.source[read], place, coherence)
                                   and self.ends_here(read))  # fmt: skip
                        registers[name] = self.read(read)
                    except _ThinAir:
                        return None
                    if not allowed:
                        return None
                else:
                    # Weak operations of different threads are never morally strong, so that nothing
                    # but causality constrains this read, and nothing depends on what it reads.
                    choices[name] = {self.value(w, place)
                                     for w in (*_bits(self.writes[place]), None)
                                     if self.may_read(read, w, place, coherence)}  # fmt: skip
        races = [
            (self.events[a], self.events[b])
            for place, at in self.at.items() for a, b in itertools.combinations(at, 2)
            if (1 << a | 1 << b) & self.writes[place] and not self.strong[a] >> b & 1
            and not self.cause[a] >> b & 1 and not self.cause[b] >> a & 1
        ]  # fmt: skip
        return Execution(registers, choices, races)


def executions(program: Program, *, reductions_pass_on: bool = True) -> Iterator[Execution]:
    """All that the model allows.

    Raises:
        NeverEnds: a barrier's wait has no arrival.
        ValueError: an opcode that is not modelled.
    """
    return _Search(program, reductions_pass_on).executions()


def allows(program: Program, **registers: Any) -> bool:
    """Whether some execution ends with these values."""
    return any(
        all(value in found.values(name) for name, value in registers.items())
        for found in executions(program)
    )


def fault(program: Program, expected: Mapping[str, Any], **options: bool) -> str | None:
    """What is wrong with a program that is to end with these values in every execution and to have
    no data-race; None: nothing."""
    ends = False
    try:
        for found in executions(program, **options):
            ends = True
            for name, value in expected.items():
                if found.values(name) != {value}:
                    return (
                        f"{name} may be any of {sorted(map(str, found.values(name)))}, not {value}"
                    )
            if found.races:
                return "data-race: {!r} and {!r}".format(*found.races[0])
    except NeverEnds as error:
        return f"does not end: {error}"
    return None if ends else "does not end"
