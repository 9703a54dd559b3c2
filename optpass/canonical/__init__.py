"""Rewrites of a captured graph that every target profits from, each with a name, a file and a test of its own."""
