"""Cards that a price is computed for.

Multiprocessors, clocks (boost) and bandwidths are of NVIDIA's data sheets; shared memory, threads
and blocks are of the table of compute capabilities in the CUDA C++ programming guide. Of
``copy_speed``, nine tenths of the bandwidth in the data sheet are assumed (H200: 4.3 of 4.8 TB/s);
``l2_bytes_per_clock`` is assumed too: no data sheet has it.
"""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    name: str
    capability: int
    target: str  # what machine code runs on it: of the library's, where that has it
    multiprocessors: int
    clock: float  # Hz
    copy_speed: float  # bytes read and written per second
    l2_bytes: int
    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    largest_cluster: int
    source: str
    registers_per_multiprocessor: int = 65536
    schedulers: int = 4
    l2_bytes_per_clock: float = 24.0  # of a multiprocessor

    @property
    def l2_speed(self) -> float:
        """Bytes per second that all multiprocessors read from L2."""
        return self.l2_bytes_per_clock * self.multiprocessors * self.clock

    def slots_per_vector(self, passes: int) -> float:
        """Instructions that all schedulers together can issue while ``passes`` times 16 bytes are
        moved, for each thread: what a loop over 16-byte vectors may have of them."""
        seconds = 16 * passes / self.copy_speed
        return 32 * seconds * self.clock * self.schedulers * self.multiprocessors


CARDS = {
    card.name: card
    for card in (
        Card("H200", 90, "90a", 132, 1.98e9, 4.3e12, 50 << 20, 232_448, 233_472, 2048, 32, 16,
             "NVIDIA H200 Tensor Core GPU data sheet (SXM: 4.8 TB/s)"),
        Card("H100", 90, "90a", 132, 1.98e9, 3.0e12, 50 << 20, 232_448, 233_472, 2048, 32, 16,
             "NVIDIA H100 Tensor Core GPU data sheet (SXM: 3.35 TB/s)"),
        Card("A100", 80, "80", 108, 1.41e9, 1.83e12, 40 << 20, 166_912, 167_936, 2048, 32, 1,
             "NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM: 2,039 GB/s)"),
        Card("L4", 89, "80", 58, 2.04e9, 0.27e12, 48 << 20, 101_376, 102_400, 1536, 24, 1,
             "NVIDIA L4 Tensor Core GPU data sheet (300 GB/s)"),
        Card("RTX 5090", 120, "120", 170, 2.41e9, 1.61e12, 96 << 20, 101_376, 102_400, 1536, 24, 8,
             "NVIDIA RTX Blackwell architecture white paper (1,792 GB/s)"),
    )
}  # fmt: skip


def occupancy(card: Card, registers: int, threads: int, shared: int) -> int:
    """Blocks per multiprocessor: of so many registers per thread (allocated in units of 256 per
    warp), threads, and bytes of shared memory (and 1 KB that the driver takes)."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        card.registers_per_multiprocessor // per_warp // warps,
        card.threads_per_multiprocessor // (32 * warps),
        card.shared_per_multiprocessor // (shared + 1024),
        card.blocks_per_multiprocessor,
    )
