"""The kernels' exchange protocols, step by step: one description is both the litmus program and
what the compiled kernel is compared with.

A protocol names its steps, the PTX instruction that each of them is, and in ``order``, a regular
expression over the steps, the order in which a thread of a kernel comes to them (see
``extraction.py``). ``litmus`` makes of the same steps the program of some blocks and images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .model import Instruction, Program, Thread, fault

#: What scratch memory holds before a kernel, and what shared memory holds.
GARBAGE = 1000
#: What shared memory of a block holds once the block has ended.
GONE = "gone"
_TOP = 0x80000000


@dataclass(frozen=True)
class Size:
    blocks: int = 2
    images: int = 1
    buffers: int = 2  # of the exchange
    slots: int = 2  # of the ring
    started: bool = False  # begins behind the barrier of the grid


Steps = Mapping[str, str]
_Expected = dict[str, Any]


@dataclass(frozen=True)
class Weakening:
    """A step that is left out (``instead`` empty) or is another instruction. ``harmless``: why the
    protocol is right without it; empty where it is not."""

    step: str
    instead: str = ""
    harmless: str = ""

    @property
    def name(self) -> str:
        return f"{self.step}: {self.instead or 'left out'}"


@dataclass(frozen=True)
class Protocol:
    """``right``: sizes at which the program is right; ``wrong``: those at which a weakening is
    looked for, until it shows. ``buffers``: one fewer is a weakening, too."""

    name: str
    steps: Steps
    order: str
    litmus: Callable[[Steps, Size], tuple[Program, _Expected]]
    right: Sequence[Size]
    wrong: Sequence[Size]
    weakenings: Sequence[Weakening]

    def fault(self, size: Size, weakening: Weakening | None = None, **options: bool) -> str | None:
        """What is wrong with it; None: nothing."""
        steps = dict(self.steps)
        if weakening and weakening.step == "buffers":
            size = replace(size, buffers=1)
        elif weakening:
            assert steps[weakening.step] != weakening.instead
            steps[weakening.step] = weakening.instead
        program, expected = self.litmus(steps, size)
        return fault(program, expected, **options)


def _present(steps: Steps, *instructions: tuple[str, Instruction]) -> list[Instruction]:
    """The steps' instructions, without those left out."""
    return [replace(i, opcode=steps[step]) for step, i in instructions if steps[step]]


def _at(place: str = "", value: Any = None, register: str = "", **more: Any) -> Instruction:
    return Instruction("", place, value, register, **more)


# ---- between blocks, through global memory ----
#
# A block has two threads: the first is the leader, which alone touches the counters; the second
# publishes what the block has, and adds up what all blocks have.


def _grid(steps: Steps, size: Size) -> tuple[Program, _Expected]:
    threads: list[Thread] = []
    expected: _Expected = {}
    for block in range(size.blocks):
        leader: list[Instruction] = []
        member: list[Instruction] = []
        if not size.started:
            leader += _present(
                steps, *([("reset", _at("counter", 0))] if block == 0 else ()), ("enter", _at("0")),
                ("count in", _at("driver", _adds(_TOP - size.blocks + 1 if block == 0 else 1))),
                ("all are in", _at("driver", until=lambda v: bool(v & _TOP))), ("pass", _at("0")),
            )  # fmt: skip
            member += _present(steps, ("enter", _at("0")), ("pass", _at("0")))
        for image in range(size.images):
            buffer = f"buffer {image % size.buffers} of"
            enough = (image + 1) * size.blocks
            leader += _present(
                steps, ("gather", _at("0")), ("announce", _at("counter", _adds(1))),
                ("await", _at("counter", until=lambda v, n=enough: v >= n)), ("spread", _at("0")),
                ("done", _at("0")),
            )  # fmt: skip
            collected = [
                (f"{image} of {b} in {block}", f"{buffer} {b}") for b in range(size.blocks)
            ]
            expected |= {register: (image, b) for b, (register, _) in enumerate(collected)}
            member += _present(
                steps, ("publish", _at(f"{buffer} {block}", (image, block))),
                ("gather", _at("0")), ("spread", _at("0")),
                *(("collect", _at(place, register=register)) for register, place in collected),
                ("done", _at("0")),
            )  # fmt: skip
        # Every block has a cluster of its own.
        threads += [Thread(leader, block, block), Thread(member, block, block)]
    return Program(threads, {"counter": 0 if size.started else GARBAGE}), expected


def _adds(n: int) -> Callable[[int], int]:
    return lambda old: old + n


GRID = Protocol(
    "grid exchange",
    {
        "reset": "st.global.u32",
        # cooperative_groups::this_grid().sync(), on a counter of the driver's.
        "enter": "barrier.sync", "count in": "atom.add.release.gpu.u32",
        "all are in": "ld.acquire.gpu.u32", "pass": "barrier.sync",
        "publish": "st.f32", "gather": "bar.sync", "announce": "red.release.gpu.global.add.u32",
        "await": "ld.acquire.gpu.global.u32", "spread": "bar.sync",
        "collect": "ld.global.cg.f32", "done": "bar.sync",
    },
    "reset? enter (count_in all_are_in+)! pass"
    " ((publish | done)* gather (announce await+)! spread (collect+ publish*)* done)* done*"
    " (publish | done)*",
    _grid,
    # The third image takes the first one's buffer again.
    right=[Size(2, 1), Size(3, 1), Size(2, 3, started=True), Size(3, 2, started=True)],
    wrong=[Size(2, 1), Size(2, 3, started=True)],
    weakenings=[
        Weakening("reset"),
        Weakening("count in", "atom.add.relaxed.gpu.u32"),
        Weakening("count in", "atom.add.release.cta.u32"),
        Weakening("count in", "atom.add.release.cluster.u32"),
        Weakening("all are in", "ld.relaxed.gpu.u32"),
        Weakening("all are in", "ld.acquire.cta.u32"),
        Weakening("all are in"),
        Weakening("enter", harmless="the leader who resets the counter counts itself in"),
        Weakening("pass", harmless="the leader alone touches the counter"),
        Weakening("gather"),
        Weakening("announce", "red.relaxed.gpu.global.add.u32"),
        Weakening("announce", "red.release.cta.global.add.u32"),
        Weakening("announce", "red.release.cluster.global.add.u32"),
        Weakening("announce"),
        Weakening("await", "ld.relaxed.gpu.global.u32"),
        Weakening("await", "ld.acquire.cta.global.u32"),
        Weakening("await", "ld.volatile.global.u32"),
        Weakening("await"),
        Weakening("spread"),
        Weakening("done", harmless="the next image has another buffer, and barriers of its own"),
        Weakening("buffers"),
    ],
)  # fmt: skip


# ---- between the blocks of a cluster, in each other's shared memory ----


def _cluster(steps: Steps, size: Size) -> tuple[Program, _Expected]:
    """One thread publishes and another collects, so that nothing rests on a thread's own order. A
    block's shared memory is gone when both have ended."""
    threads: list[Thread] = []
    expected: _Expected = {}
    for block in range(size.blocks):
        publisher: list[Instruction] = []
        collector: list[Instruction] = []
        for image in range(size.images):
            buffer = f"buffer {image % size.buffers} of"
            barrier = (("arrive", _at()), ("wait", _at()))
            publisher += _present(steps, ("publish", _at(f"{buffer} {block}", (image, block))),
                                  *barrier, ("done", _at("0")))  # fmt: skip
            collector += _present(steps, *barrier)
            for b in range(size.blocks):
                register = f"{image} of {b} in {block}"
                expected[register] = (image, b)
                collector += _present(steps, ("collect", _at(f"{buffer} {b}", register=register)))
            collector += _present(steps, ("done", _at("0")))
        leave = _present(steps, ("leave", _at()), ("all have left", _at()))
        end = Instruction("bar.arrive", "end")
        places = [f"buffer {i} of {block}" for i in range(min(size.buffers, size.images))]
        gone = [Instruction("bar.sync", "end"), *(Instruction("st.u32", p, GONE) for p in places)]
        threads += [Thread([*instructions, *leave, end], block)
                    for instructions in (publisher, collector)]  # fmt: skip
        threads.append(Thread(gone, block))
    return Program(threads), expected


_ARRIVE, _WAIT = "barrier.cluster.arrive.release.aligned", "barrier.cluster.wait.acquire.aligned"
CLUSTER = Protocol(
    "cluster exchange",
    {
        "publish": "st.f32", "arrive": _ARRIVE, "wait": _WAIT, "collect": "ld.f32 of mapa",
        "done": "bar.sync", "leave": _ARRIVE, "all have left": _WAIT,
    },
    "((publish | done)* arrive wait (collect+ publish*)* done)* (publish | done)*"
    " leave all_have_left",
    _cluster,
    right=[Size(2, 1), Size(2, 3), Size(3, 1), Size(3, 3)],
    wrong=[Size(2, 1), Size(2, 2), Size(2, 3)],
    weakenings=[
        Weakening("arrive", "barrier.cluster.arrive.relaxed.aligned"),
        Weakening("arrive"),
        Weakening("wait"),
        Weakening("done", harmless="the next image has another buffer, and a barrier of its own"),
        Weakening("leave", "barrier.cluster.arrive.relaxed.aligned"),
        Weakening("all have left"),
        Weakening("buffers"),
    ],
)  # fmt: skip


# ---- within a block, from the copies to the threads ----

_BYTES = 1  # of a piece, as one copy brings it


def _mbarrier(arrivals: int, transactions: int) -> Callable[[Any], Any]:
    """What such an operation makes of an mbarrier: phases completed, arrivals and bytes pending."""

    def update(state: Any) -> Any:
        if state == GARBAGE:
            return state
        phase, pending, transferring = state
        pending, transferring = pending - arrivals, transferring + transactions
        return (phase, pending, transferring) if pending or transferring else (phase + 1, 1, 0)

    return update


def _bulk_ring(steps: Steps, size: Size) -> tuple[Program, _Expected]:
    """Two lanes of a warp that copy a piece each, of which the first arrives; and a thread of
    another warp. All three read the first piece, the last one the second, too."""
    threads: list[Thread] = []
    expected: _Expected = {}
    pieces = 2 if size.slots == 1 else 1  # more executions than can be enumerated otherwise
    announced = pieces * _BYTES if "expect_tx" in steps["expect"] else 0
    for number, (warp, lane) in enumerate([(0, 0), (0, 1), (1, 0)]):

        def start(image: int, warp: int = warp, lane: int = lane) -> list[Instruction]:
            if warp or image >= size.images:
                return []
            slot = image % size.slots
            arrival = ("expect", _at(f"mbarrier {slot}", _mbarrier(1, announced)))
            copy = ("copy", _at(f"slot {slot} piece {lane}", image, mbarrier=f"mbarrier {slot}",
                                complete=_mbarrier(0, -_BYTES)))  # fmt: skip
            return _present(steps, ("proxy fence", _at()), *([arrival] if lane == 0 else []),
                            ("converge", _at()), *([copy] if lane < pieces else []))  # fmt: skip

        thread: list[Instruction] = []
        if number == 0:
            thread += _present(steps, *(("init", _at(f"mbarrier {slot}", (0, 1, 0)))
                                        for slot in range(size.slots)),
                               ("init fence", _at()))  # fmt: skip
        thread += _present(steps, ("open", _at("0")))
        for image in range(size.slots - 1):
            thread += start(image)
        for image in range(size.images):
            thread += start(image + size.slots - 1)
            slot, parity = image % size.slots, image // size.slots & 1
            thread += _present(steps, (
                "wait", _at(f"mbarrier {slot}",
                            until=lambda s, p=parity: s == GARBAGE or s[0] & 1 != p)))  # fmt: skip
            for piece in range(pieces if number == 2 else 1):
                register = f"image {image} piece {piece} in {number}"
                expected[register] = image
                thread += _present(steps, ("read", _at(f"slot {slot} piece {piece}",
                                                       register=register)))  # fmt: skip
            thread += _present(steps, ("done", _at("0")))
        threads.append(Thread(thread, warp=warp))
    places = [f"mbarrier {slot}" for slot in range(size.slots)]
    return Program(threads, dict.fromkeys(places, GARBAGE)), expected


BULK_RING = Protocol(
    "mbarrier ring",
    {
        "init": "mbarrier.init.shared::cta.b64",
        "init fence": "fence.mbarrier_init.release.cluster", "open": "bar.sync",
        "proxy fence": "fence.proxy.async.shared::cta",
        "expect": "mbarrier.arrive.expect_tx.shared::cta.b64", "converge": "bar.warp.sync",
        "copy": "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
        "wait": "mbarrier.try_wait.parity.shared::cta.b64", "read": "ld.shared.v4.u32",
        "done": "bar.sync",
    },
    "done* (init* init_fence)? open (proxy_fence expect! converge copy*)* done"
    " ((proxy_fence expect! converge copy*)? wait+ (read* done)+)* done*",
    _bulk_ring,
    right=[Size(1, 2, slots=1), Size(1, 3, slots=2)],
    wrong=[Size(1, 1, slots=1), Size(1, 2, slots=1), Size(1, 3, slots=2)],
    weakenings=[
        Weakening("init"),
        Weakening("init fence", harmless="if complete-tx goes through the generic proxy, as the"
                  " model has it: then the barrier puts the copies after the initialisation"),
        Weakening("open"),
        Weakening("proxy fence"),
        Weakening("expect", "mbarrier.arrive.shared::cta.b64"),
        Weakening("expect", "mbarrier.arrive.expect_tx.relaxed.cta.shared::cta.b64",
                  harmless="the data come with complete-tx; the arrival publishes nothing"),
        Weakening("expect"),
        Weakening("converge", harmless="the phase cannot end before the arrival, however many bytes"
                  " have come by then"),
        Weakening("wait", "mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64"),
        Weakening("wait"),
        Weakening("done"),
    ],
)  # fmt: skip


def _async_ring(steps: Steps, size: Size) -> tuple[Program, _Expected]:
    """Two threads; each copies a piece, and reads the other's."""
    threads: list[Thread] = []
    expected: _Expected = {}
    for number in range(2):

        def start(image: int, number: int = number) -> list[Instruction]:
            copy = ("copy", _at(f"slot {image % size.slots} piece {number}", image))
            return _present(steps, *([copy] if image < size.images else []), ("commit", _at()))

        thread: list[Instruction] = []
        for image in range(size.slots - 1):
            thread += start(image)
        thread += _present(steps, ("open", _at("0")))
        for image in range(size.images):
            thread += start(image + size.slots - 1)
            register = f"image {image} in {number}"
            expected[register] = image
            thread += _present(
                steps, ("complete", _at()), ("arrived", _at("0")),
                ("read", _at(f"slot {image % size.slots} piece {1 - number}", register=register)),
                ("done", _at("0")),
            )  # fmt: skip
        threads.append(Thread(thread))
    return Program(threads), expected


def async_ring(slots: int) -> Protocol:
    """The ring of cp.async has as many groups on their way as slots but one."""
    return Protocol(
        f"cp.async ring of {slots}",
        {
            "copy": "cp.async.cg.shared.global", "commit": "cp.async.commit_group",
            "open": "bar.sync", "complete": f"cp.async.wait_group {slots - 1}",
            "arrived": "bar.sync", "read": "ld.shared.v4.u32", "done": "bar.sync",
        },
        "done* (copy* commit)* open (copy* commit complete arrived (read* done)+)* done*",
        _async_ring,
        right=[Size(1, n, slots=slots) for n in (1, slots + 1, slots + 2)],
        wrong=[Size(1, n, slots=slots) for n in (1, slots + 1)],
        weakenings=[
            Weakening("complete", f"cp.async.wait_group {slots}"),
            Weakening("complete"),
            Weakening("commit"),
            Weakening("open", harmless="what it keeps in order are arrays of the block, not slots"),
            Weakening("arrived"),
            Weakening("done"),
        ],
    )  # fmt: skip


PROTOCOLS = (GRID, CLUSTER, BULK_RING, *map(async_ring, (1, 2, 3)))


def weakened() -> Iterator[tuple[Protocol, Weakening]]:
    return ((p, w) for p in PROTOCOLS for w in p.weakenings)
