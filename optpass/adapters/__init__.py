"""Adapters: small trained files that change a model's weights, read lazily and matched to a Program."""
