"""Where bytes come from and go to: registries over HTTP, and OCI image-layout directories."""
