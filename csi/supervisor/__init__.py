"""The supervisor: starts, watches and replaces workers and fetchers, and holds a second copy of every connection.

It parses nothing that comes from a registry: manifests and trees pass through as sealed memfds.
"""
