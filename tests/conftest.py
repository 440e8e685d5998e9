"""Settings for every test."""

import os

# Threads that wait should sleep: on a machine that does other work too, spinning ones make a step take seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
