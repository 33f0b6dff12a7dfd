"""Which module each layer gets, as data, and how it is chosen."""
