"""New units on data: their outgoing weights, the decrease of the loss, and whether it is significant."""
