"""From a graph and units per width to a wider graph, with the same function or with given values."""
