"""Recipe, pass and target base classes, the manager, gates and reproducers."""
