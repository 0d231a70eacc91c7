"""How much of what people bring can be read, and how much of it can grow: `python -m benchmarks.coverage`."""
