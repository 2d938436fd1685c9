"""Which of two answers is better, by eye and without knowing whose they are. Imports no torch."""
