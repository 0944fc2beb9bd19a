"""Names that settings may hold in place of a path."""

BUILT_IN = ("photos", "digits")
"""Images that installed packages bring."""
