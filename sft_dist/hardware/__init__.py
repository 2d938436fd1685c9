"""What GPUs can do and what machines cost: two tables with their sources, and typed readers. Imports no torch."""
