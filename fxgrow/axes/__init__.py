"""Axes: what a graph is run on to find its widths, and the records that come of it."""
