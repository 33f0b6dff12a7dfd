"""The core idea: a method is a transform, run by a hook where the forward pass reaches its sites."""
