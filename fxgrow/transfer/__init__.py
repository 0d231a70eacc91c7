"""What must follow a model when it grows: optimisers, averages, hooks, wrappers, shards."""
