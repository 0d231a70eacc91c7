"""Whether growth ever harms a run: stock networks trained with and without it, `python -m benchmarks.harmless`."""
