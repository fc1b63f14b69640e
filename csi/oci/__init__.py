"""OCI values: references, digests, descriptors, manifests. Bytes in, values out; nothing here does I/O."""
