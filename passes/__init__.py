"""The passes that optpass ships: one file, one pass."""
