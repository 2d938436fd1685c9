"""The model and its loss: built, quantised and adapted here; nothing in this package knows how it is sharded."""
