"""What the user writes: a frozen, typed schema, its loader and its cross-checks. Imports no torch."""
