"""What serves a trained model: predictions, exports."""
