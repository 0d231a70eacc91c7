"""From a captured graph to its widths, and why a width is pinned."""
