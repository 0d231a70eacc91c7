"""Grown models in files, and a training run with them."""
