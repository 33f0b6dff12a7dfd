"""Tasks, batches and a small built-in data set. Importing it is cheap: readers load when they are used."""
