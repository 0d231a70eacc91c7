"""Documentation, and the check that its examples run."""
