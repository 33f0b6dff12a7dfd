"""A small space of plans for the tiny model."""

LAYERS = 2  # of the tiny model
SPACE = {
    "serial": {"method": "pfeiffer", "option": "bottleneck", "sizes": (0, 1, 2, 4)},
    "flat": {"method": "prefix", "option": "num_virtual_tokens", "sizes": (0, 3), "options": {"mlp_hidden": None}},
}
