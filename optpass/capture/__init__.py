"""Checkpoint → Program, one file per kind of source."""
