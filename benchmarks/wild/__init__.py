"""Networks of packages that fxgrow was not built against: `python -m benchmarks.wild`."""
