"""The halves of targets that run in vendors' own environments, one file for each; none is imported by optpass."""
