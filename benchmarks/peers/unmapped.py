"""Why a row is not predicted."""


class Unmapped(Exception):
    """The row leaves open, or names, something that decides memory and that is not modelled; str() is the reason."""
