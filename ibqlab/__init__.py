"""ibqlab: why do codebooks collapse, and what keeps every code alive?"""

import os

__version__ = "0.1.0"

# Threads that wait by spinning make small networks ten times slower on a busy machine. torch's library of threads reads
# this once, when torch is imported, and child processes inherit it. An explicit value of either variable wins;
# GOMP_SPINCOUNT=300000 is what the library does by itself.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
