"""What a run shows: on the console while it goes, as tables and pictures afterwards."""
