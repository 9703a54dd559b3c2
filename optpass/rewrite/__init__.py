"""Pattern → replacement over the dialect."""
