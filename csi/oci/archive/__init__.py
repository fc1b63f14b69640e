"""What lies in an archive layer: tar headers in, members out. Nothing here does I/O, and nothing is extracted."""
