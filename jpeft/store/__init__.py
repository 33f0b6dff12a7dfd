"""Trained modules on disk."""
