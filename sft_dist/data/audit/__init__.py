"""What is wrong with a data set, found before a GPU is taken: checks, figures, and their reports."""
