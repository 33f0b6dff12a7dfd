"""Plans, which say as data which module each layer gets, and how to choose them."""
