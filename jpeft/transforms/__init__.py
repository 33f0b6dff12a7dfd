"""One method a file; `registry` knows them by name, `parts` holds what several of them share."""
