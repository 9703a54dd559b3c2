"""The recipes that optpass ships, as YAML files."""
