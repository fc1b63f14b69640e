"""The fetcher: one process per mount with network and a writable cache area, and without FUSE."""
