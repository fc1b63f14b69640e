"""How models are stored in registries: one module per format, each a pure function from a manifest to a plan."""
