"""Tasks: datasets together with the functions that verify their answers."""
