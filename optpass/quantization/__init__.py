"""Quantisation: where quantisers go, what their ranges are, and how they are put into a graph."""
