"""What is done with trained modules: predictions, exports, submissions."""
