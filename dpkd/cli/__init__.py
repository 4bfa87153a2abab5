"""The command line."""

import os

# OpenMP's threads spin while they wait, which slows everything down on a shared machine. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
