"""Plans of the reference-model test: what is done to a node while processes read from it. A plan is a value that a seed
makes, any part of a plan is a plan, and one that fails is cut down to the steps that matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

SLOTS = 3
REGISTRIES = 2
MODELS = ("m1", "m2", "m3")

_WEIGHTS = {
    "publish": 14,
    "run": 12,
    "unpublish": 7,
    "kill": 10,
    "damage": 5,
    "cut_live": 3,
    "prune": 3,
    "verify_cache": 1,
    "fault": 8,
    "outage": 2,
    "lie": 4,
    "check": 3,
    "restart": 3,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do. `fields` are plain numbers and words."""

    kind: str
    fields: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.fields.items())})"


@dataclass(frozen=True, slots=True)
class Plan:
    """`backend`: of FUSE, `raw` and `passthrough` are one, without and with. `seal`: as the node's flag. `cache_limit` 0: none. `pace_s`: what a registry
    takes for a MiB.
    """

    seed: int
    backend: str
    seal: str
    cache_limit: int
    pace_s: float
    readers: int
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        head = (
            f"seed {self.seed}: {self.backend}, seal {self.seal}, cache limit {self.cache_limit}, {self.pace_s * 1000:.0f} ms/MiB, "
            f"{self.readers} readers"
        )
        return "\n  ".join([head, *map(str, self.steps)])


def make(seed: int, steps: int) -> Plan:
    """The same plan for the same arguments."""
    chosen = random.Random(seed)
    return Plan(
        seed=seed,
        backend=chosen.choice(["passthrough", "raw", "pyfuse3"]),
        seal=chosen.choice(["auto", "always", "never"]),
        cache_limit=chosen.choice([0, 0, 0, 250 << 20]),
        pace_s=chosen.choice([0.0, 0.002, 0.02]),
        readers=chosen.choice([2, 3, 4]),
        steps=(_step(chosen, "publish"), *(_step(chosen) for _ in range(steps - 1))),
    )


def _step(chosen: random.Random, kind: str | None = None) -> Step:
    kind = kind or chosen.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    slot, registry = chosen.randrange(SLOTS), chosen.randrange(REGISTRIES)
    match kind:
        case "publish":
            verify = chosen.choice(["default", "default", "chunk", "whole", "eager"])
            fields: dict[str, Any] = {
                "slot": slot,
                "registry": registry,
                "model": chosen.choice(MODELS),
                "indexed": verify == "chunk" or chosen.random() < 0.5,
                "verify": verify,
                "ondemand": verify == "chunk" and chosen.random() < 0.3,
            }
        case "run":
            fields = {"seconds": round(chosen.random() * 1.5, 2)}
        case "unpublish" | "check":
            fields = {"slot": slot}
        case "kill":
            role = chosen.choice(["worker", "fetcher", "fetcher", "store", "store"])
            fields = {"role": role, "slot": slot, "after_s": round(chosen.random() * 0.6, 2)}
        case "restart":
            fields = {"role": chosen.choice(["supervisor", "keeper", "nursery"])}
        case "damage":
            how = chosen.choice(["flip", "cut", "swap", "remove", "empty"])
            fields = {"how": how, "which": chosen.random(), "at": chosen.random()}
        case "cut_live":
            fields = {"which": chosen.random(), "at": chosen.random()}
        case "fault":
            how = chosen.choice(["503", "stall", "short", "reset", "gzip", "flip", "flip"])
            fields = {"registry": registry, "how": how, "times": chosen.randrange(1, 4), "at": chosen.random()}
        case "outage":
            fields = {"registry": registry, "seconds": chosen.choice([1.0, 3.0])}
        case "lie":
            fields = {"registry": registry, "file": chosen.choice("abc"), "at": chosen.random()}
            fields["seconds"] = round(chosen.random() * 3, 2)
        case _:
            fields = {}
    return Step(kind, fields)


def shrunk(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """The smallest plan found by leaving out steps that `fails` still says yes to. Failures that need luck are asked for
    by `fails` as often as it likes.
    """
    size = max(1, len(plan.steps) // 2)
    while True:
        start = 0
        while start < len(plan.steps):
            smaller = _with_steps(plan, plan.steps[:start] + plan.steps[start + size :])
            if smaller.steps and fails(smaller):
                plan = smaller
            else:
                start += size
        if size == 1:
            return plan
        size = max(1, size // 2)


def _with_steps(plan: Plan, steps: tuple[Step, ...]) -> Plan:
    return replace(plan, steps=steps)
