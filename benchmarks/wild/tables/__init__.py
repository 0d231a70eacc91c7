"""One file per kind of network, each with a list `ENTRIES`."""
