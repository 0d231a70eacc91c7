"""Side by side with other libraries, and over seeds; run each with `python -m benchmarks.<name>`."""
