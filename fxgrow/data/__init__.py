"""Batches, losses, random states and progress of whatever reads data."""
