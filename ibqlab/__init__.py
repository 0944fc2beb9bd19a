"""ibqlab: why do codebooks collapse, and what keeps every code alive?"""

__version__ = "0.1.0"
