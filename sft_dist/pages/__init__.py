"""What every page that this program writes has in common: its style, and how its template is read. Imports no torch."""
