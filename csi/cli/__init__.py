"""The `modelmount` command: one module per group of verbs, imported only when its verb is used."""
