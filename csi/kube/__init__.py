"""The Kubernetes API, where there is one."""
