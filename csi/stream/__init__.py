"""Decisions of the read path: which block, in what order, how far ahead. No I/O; the edges implement `ports`."""
