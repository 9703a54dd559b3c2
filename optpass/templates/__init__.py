"""Templates that ``optpass new-pass`` fills in."""
