"""Which boot of the machine this is: what is mounted, and what was marked before it was durable, ends with it."""

from __future__ import annotations


def this_boot() -> bytes:
    """16 bytes that differ from boot to boot. Source: random(4), /proc/sys/kernel/random/boot_id."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))
