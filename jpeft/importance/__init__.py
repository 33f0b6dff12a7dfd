"""What gradients say: Fisher information, masks of single entries, averages of models."""
