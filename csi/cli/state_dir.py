"""Which of the two drivers a machine may have a command asks, when it is not told: the node's, or the one by hand."""

from __future__ import annotations

import os

NODE, BY_HAND = "/run/modelmount", "/run/modelmount-by-hand"
HELP = (
    f"where keeper and supervisor listen (default {NODE}; {BY_HAND}, that of 'modelmount mount', where only that runs)"
)


def running_state_dir() -> str:
    """The node's, unless only `modelmount mount` has started a supervisor."""
    if os.path.exists(f"{NODE}/supervisor.sock") or not os.path.exists(f"{BY_HAND}/supervisor.sock"):
        return NODE
    return BY_HAND
