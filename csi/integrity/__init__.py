"""The block index: what makes a single block of a blob checkable. Bytes in, values out."""
