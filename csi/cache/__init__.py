"""The node cache on disk: segments of blob bytes and a map of the blocks that are there."""
