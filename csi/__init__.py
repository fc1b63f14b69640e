"""ModelMount: AI models in OCI registries as Kubernetes volumes."""
