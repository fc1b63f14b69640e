"""The FUSE edge: the INIT handshake both keeper and workers rely on, the operations, and the backends."""
