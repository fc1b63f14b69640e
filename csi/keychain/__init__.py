"""Where a node's, or a person's, own registry logins come from: docker's configuration, its helpers, kubelet's plugins."""
