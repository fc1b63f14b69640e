"""The keeper: the one privileged process. It mounts, binds and unmounts, and keeps every /dev/fuse descriptor.

Standard library only, and nothing that comes from a registry is ever parsed here. It changes rarely by design:
while it lives (or the supervisor, which holds the same descriptors) no mount is lost.
"""
