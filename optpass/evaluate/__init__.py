"""Numeric difference, quality metrics, latency."""
