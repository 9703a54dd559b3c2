"""Load a bundle and run it."""
