"""Facts that passes ask for, derived from a Program."""
