"""Finished runs as tables, pictures and pages."""
