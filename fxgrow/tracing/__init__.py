"""From a module to a graph: the tracer, its proxies, and what cannot be followed."""
