"""Python environments of vendors' own, whose packages clash with ours: installed apart, run as subprocesses."""
