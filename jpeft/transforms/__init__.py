"""One method per file; `registry` lists them by name, `parts` contains code that several of them share."""
