"""Importance from gradients: Fisher information, masks of single entries, averages of models."""
