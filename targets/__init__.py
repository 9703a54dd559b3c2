"""The targets that optpass ships: one file, one target."""
