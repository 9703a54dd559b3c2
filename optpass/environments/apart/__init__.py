"""What runs in a vendor's Python: it imports the standard library and the vendor's packages, and nothing of optpass."""
