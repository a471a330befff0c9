"""The comparison: one table of methods, its settings, its sweep; everything may be seen, nothing is private."""
