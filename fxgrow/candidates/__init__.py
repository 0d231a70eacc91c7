"""New units tried on data: their outgoing weights, their worth, and whether they are significant."""
