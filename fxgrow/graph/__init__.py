"""Graphs of torch.fx: their nodes, tensors, metadata and evaluation; what every pass needs."""
