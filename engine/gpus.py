"""What a card can do: published peaks, and the fixed rates that predictions use instead of them.

The reachable rates of the RTX 4090 are 158 TFLOPS in bfloat16 and 480 TOPS in int8 for matrix products, 150 and 280
for attention (bfloat16, int8 queries and keys), 0.92 TB/s, and 2 microseconds a graph node; arithmetic takes longer by
what programs of our kernels leave idle in their last turn on all multiprocessors. Every other card is taken
to reach the same share of its own published peaks: an assumption, not a measurement. A rate changes only with a
measurement in `bench/results/`.

Peaks are dense, with float32 sums, at the vendor's boost clock. Shared memory is what one block may ask for.
"""

import math
from dataclasses import dataclass

KIB, MIB, GIB = 2**10, 2**20, 2**30
# Of one block, by compute capability, after the KiB that the system keeps (CUDA C++ programming guide).
SHARED_PER_BLOCK = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
# What cuBLAS works in, by stream, out of torch's allocator and for good: torch's defaults for CUBLAS_WORKSPACE_CONFIG
# (notes on CUDA environment variables, CublasHandlePool.cpp) from Hopper on, and before: 2 x 4 MiB and 8 x 16 KiB.
WORKSPACES = {90: 32 * MIB, 0: 8 * MIB + 128 * KIB}
STREAMS = 2  # that multiply: the one of computing, and the one on which graphs are captured
NODE_SECONDS = 2e-6  # a node of a replayed graph
# Share of the peak that is reached, by kind of work and precision: the rates above over the peaks of the RTX 4090.
_MATMUL = {"bf16": 158 / 165.2, "int8": 480 / 660.6}
_ATTENTION = {"bf16": 150 / 165.2, "int8": 280 / 660.6}
_BANDWIDTH = 0.92 / 1.008


@dataclass(frozen=True)
class Card:
    name: str  # short, as --gpu takes it
    device_names: tuple[str, ...]  # as torch.cuda.get_device_name says
    capability: int  # 10 * major + minor
    sms: int
    vram_bytes: int
    bf16_tflops: float
    int8_tops: float
    gb_per_second: float

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one block may ask for."""
        return SHARED_PER_BLOCK[self.capability]

    @property
    def workspace_bytes(self) -> int:
        """Of memory that libraries work in, on all streams."""
        return STREAMS * WORKSPACES[90 if self.capability >= 90 else 0]

    @property
    def bytes_per_second(self) -> float:
        """Reachable."""
        return self.gb_per_second * 1e9 * _BANDWIDTH

    def flop_per_second(self, kind: str, precision: str) -> float:
        """Reachable: kind "attention" or anything else, precision "int8", "fp32" or a 16-bit one.

        float32 means float32 here, without TF32. Its peak is taken as half of bfloat16's, as on the GeForce cards.
        """
        share = (_ATTENTION if kind == "attention" else _MATMUL)["int8" if precision == "int8" else "bf16"]
        if precision == "int8":
            return self.int8_tops * 1e12 * share
        return self.bf16_tflops * 1e12 * share * (0.5 if precision == "fp32" else 1.0)

    def in_whole_turns(self, programs: int) -> float:
        """How much longer so many equal programs take than if they filled all multiprocessors to the end."""
        return math.ceil(programs / self.sms) * self.sms / programs if programs else 1.0

    def seconds(self, kind: str, precision: str, flop: float, nbytes: int, launches: int) -> float:
        """The roofline: arithmetic or memory, whichever is slower, and the graph nodes."""
        busy = max(flop / self.flop_per_second(kind, precision), nbytes / self.bytes_per_second)
        return busy + launches * NODE_SECONDS


def _geforce(
    model: str, capability: int, sms: int, gib: int, bf16: float, int8: float, gb_per_second: float, name: str = ""
) -> Card:
    short = name or f"rtx{model.lower().replace(' ', '')}"
    return Card(short, (f"NVIDIA GeForce RTX {model}",), capability, sms, gib * GIB, bf16, int8, gb_per_second)


# The vendor's architecture whitepapers and data sheets. torch says the same name for some cards of two VRAM sizes:
# the name then finds the common one. Memory is the nominal size; of the H200, whose 141 GB are no whole GiB, what
# nvidia-smi reports.
_CARDS = (
    _geforce("3050", 86, 18, 6, 13.5, 54.2, 168, name="rtx3050-6g"),
    _geforce("3060", 86, 28, 12, 25.5, 102.0, 360),
    _geforce("3080", 86, 68, 10, 59.5, 238.0, 760),
    _geforce("3090", 86, 82, 24, 71.0, 284.0, 936),
    _geforce("4060", 89, 24, 8, 30.2, 121.0, 272),
    _geforce("4060 Ti", 89, 34, 16, 44.1, 176.5, 288, name="rtx4060ti-16g"),
    _geforce("4070", 89, 46, 12, 58.3, 233.2, 504),
    _geforce("4070 Ti SUPER", 89, 66, 16, 88.2, 352.8, 672),
    _geforce("4080", 89, 76, 16, 97.5, 389.9, 717),
    _geforce("4090", 89, 128, 24, 165.2, 660.6, 1008),
    _geforce("5070 Ti", 120, 70, 16, 87.9, 351.5, 896),
    _geforce("5080", 120, 84, 16, 112.6, 450.2, 960),
    _geforce("5090", 120, 170, 32, 209.5, 838.0, 1792),
    Card("l4", ("NVIDIA L4",), 89, 58, 24 * GIB, 121.0, 242.0, 300),
    Card("l40s", ("NVIDIA L40S",), 89, 142, 48 * GIB, 362.0, 733.0, 864),
    Card("a100-80g", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 80, 108, 80 * GIB, 312.0, 624.0, 2039),
    Card("h100", ("NVIDIA H100 80GB HBM3",), 90, 132, 80 * GIB, 989.0, 1979.0, 3350),
    Card("h200", ("NVIDIA H200",), 90, 132, 143771 * MIB, 989.0, 1979.0, 4800),
)
CARDS = {card.name: card for card in _CARDS}
DEVICE_NAMES = {name: card for card in _CARDS for name in card.device_names}


def card(name: str) -> Card:
    """By short name (rtx4090, in any case) or by the name torch gives a device. Raises ValueError."""
    found = DEVICE_NAMES.get(name) or CARDS.get(name.lower().replace(" ", ""))
    if found is None:
        raise ValueError(f"nothing is known about a card called {name!r:.80}: known are {', '.join(CARDS)}")
    return found
