"""The file tree of a model: names, inodes and where each file's bytes lie. Built once, serialised, never recomputed."""
