"""The CSI node service: requests in, publications out. Nothing here parses what came from a registry."""
