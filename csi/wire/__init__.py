"""Generated from proto/csi/wire by `make proto`; never edited by hand."""
