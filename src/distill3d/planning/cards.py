"""Graphics cards by name: memory, rates and bandwidth from the data sheets of their maker, and what is assumed of them.

Rates are dense (without sparsity), half precision with float32 accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill3d.planning.meter import Operation

UTILIZATION = 0.5  # share of the published arithmetic rate that a large matrix product or convolution reaches
BANDWIDTH_SHARE = 0.7  # the same for memory
LAUNCH = 8e-6  # seconds that a kernel takes at least, with Python before it
PCIE = 20e9  # bytes per second from main memory, for --offload
CONTEXT = 0.7e9  # bytes that CUDA and its libraries take of a card
LIBRARIES = 0.6e9  # bytes that Python, torch and diffusers take of main memory
RESERVE = 0.05  # of the memory, for what the allocator cannot use


@dataclass(frozen=True)
class Card:
    """A card as its data sheet describes it."""

    name: str
    memory: float  # GB, 10^9 bytes
    half: float  # TFLOP/s in bfloat16 or float16
    convolution: float  # TFLOP/s of TF32, in which cuDNN computes float32 convolutions; float32's where there is none
    float32: float  # TFLOP/s
    bandwidth: float  # GB/s
    bfloat16: bool = True  # whether it has the instructions

    def seconds(self, work: Mapping[Operation, int]) -> float:
        """The time of so many operations, one after the other, each limited by arithmetic, memory or its launch."""
        rates = {"half": self.half, "convolution": self.convolution, "float32": self.float32}
        return sum(
            times
            * max(
                one.flops / (UTILIZATION * rates[one.kind] * 1e12),
                one.bytes / (BANDWIDTH_SHARE * self.bandwidth * 1e9),
                LAUNCH,
            )
            for one, times in work.items()
        )


# NVIDIA: data sheets of H100 (2022, SXM and PCIe), H200 (2024), A100 (2021), L40S, L4, A10, RTX A6000, V100 and T4;
# for GeForce the architecture papers of Ampere GA102, Ada and Blackwell. GeForce halves the rate of half precision
# where sums are float32, and of TF32.
CARDS = {
    card.name: card
    for card in (
        Card("H200", 141, 989, 494, 67, 4800),
        Card("H100", 80, 989, 494, 67, 3350),  # SXM
        Card("H100-PCIe", 80, 756, 378, 51, 2000),
        Card("A100", 80, 312, 156, 19.5, 2039),  # SXM
        Card("A100-40", 40, 312, 156, 19.5, 1555),
        Card("L40S", 48, 362, 183, 91.6, 864),
        Card("L4", 24, 121, 60, 30.3, 300),
        Card("A10", 24, 125, 62.5, 31.2, 600),
        Card("A6000", 48, 155, 77.4, 38.7, 768),
        Card("V100", 32, 125, 15.7, 15.7, 900, bfloat16=False),
        Card("T4", 16, 65, 8.1, 8.1, 320, bfloat16=False),
        Card("RTX5090", 32, 209.5, 104.8, 104.8, 1792),
        Card("RTX4090", 24, 165.2, 82.6, 82.6, 1008),
        Card("RTX4080", 16, 97.5, 48.7, 48.7, 717),
        Card("RTX3090", 24, 71, 35.6, 35.6, 936),
        Card("RTX3080", 10, 59.5, 29.8, 29.8, 760),
        Card("RTX3060", 12, 25.5, 12.7, 12.7, 360),
    )
}


def find_card(name: str) -> Card:
    """The card of this name, in any case and with or without spaces and hyphens; ValueError with all names."""
    known = {_plain(one): card for one, card in CARDS.items()}
    if _plain(name) not in known:
        raise ValueError(f"unknown card {name!r}: use {', '.join(CARDS)}")
    return known[_plain(name)]


def card_of(device: str) -> Card | None:
    """The card in a device such as "cuda:H100"; None for a plain device, which is one of this machine."""
    kind, _, name = device.partition(":")
    return None if not name or name.isdecimal() or kind != "cuda" else find_card(name)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
