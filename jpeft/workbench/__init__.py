"""Experiments over many runs: comparisons, searches, regret, the table of methods."""
