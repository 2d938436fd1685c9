"""Data-parallel strategies: each describes what a rank will hold, and applies itself to a built model from outside."""
