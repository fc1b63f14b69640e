"""The worker: one process per mount. It parses what the registry sent and answers the kernel; it has no network."""
