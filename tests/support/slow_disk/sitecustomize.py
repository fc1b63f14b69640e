"""A fail-point: with MODELMOUNT_TEST_WRITE_BYTES_PER_S the cache's writer takes no more than that, as a slow disk would.

Python imports this at the start of each process of a node that has this directory in PYTHONPATH.
"""

from __future__ import annotations

import os
import threading
import time

if limit := float(os.environ.get("MODELMOUNT_TEST_WRITE_BYTES_PER_S", "0")):
    from csi.cache import blob

    _write = blob.BlockWrite.write
    _lock = threading.Lock()
    _free_at = 0.0

    def _limited(self: blob.BlockWrite, start: int, data: memoryview) -> None:
        global _free_at
        with _lock:
            now = time.monotonic()
            _free_at = max(now, _free_at) + len(data) / limit
            wait = _free_at - now
        time.sleep(wait)
        _write(self, start, data)

    blob.BlockWrite.write = _limited  # type: ignore[method-assign]
