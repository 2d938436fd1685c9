"""A run, or several side by side, as pages that people look at: read from run directories. Imports no torch."""
