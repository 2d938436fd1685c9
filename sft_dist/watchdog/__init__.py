"""No silent stall: a rank that makes no progress is found, named and left within minutes."""
