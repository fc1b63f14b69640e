"""The store: one process per node that shares proven blobs between mounts and keeps the cache within its limits."""
