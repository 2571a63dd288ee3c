"""Devices that people run small models on: size and published bandwidth of their memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A computer on which somebody may run a file.

    Attributes:
        name: Its common name.
        bandwidth: Published peak memory bandwidth, bytes/s: transfers per second × width of the bus.
        memory_bytes: Memory of the usual model.
    """

    name: str
    bandwidth: float
    memory_bytes: int


_GB = 10**9
_GIB = 1 << 30

DEVICES: tuple[Device, ...] = (
    Device("Raspberry Pi 4, 4 GB", 12.8 * _GB, 4 * _GIB),  # LPDDR4-3200, 32 bits (raspberrypi.com, BCM2711)
    Device("Raspberry Pi 5, 8 GB", 17.1 * _GB, 8 * _GIB),  # LPDDR4X-4267, 32 bits (raspberrypi.com, BCM2712)
    Device("laptop, DDR4-3200, 16 GB", 51.2 * _GB, 16 * _GIB),  # two channels of 64 bits (JEDEC JESD79-4)
    Device("laptop, DDR5-5600, 16 GB", 89.6 * _GB, 16 * _GIB),  # two channels of 64 bits (JEDEC JESD79-5)
    Device("Apple M1, 8 GB", 68.2 * _GB, 8 * _GIB),  # LPDDR4X-4266, 128 bits (apple.com)
    Device("Apple M2 or M3, 8 GB", 100 * _GB, 8 * _GIB),  # apple.com, MacBook Air specifications
    Device("Apple M4, 16 GB", 120 * _GB, 16 * _GIB),  # apple.com, MacBook Air specifications
)

USABLE_SHARE = 0.8
"""Share of a device's memory that a model may take; the system and other programs need the rest."""
