"""The tests; see `tests/cpu.py` on what they may cost."""

import os

# Read when torch is loaded, which is after this. Threads that wait would else turn in circles, and the tests of several
# threads took up to ten times the CPU seconds where other processes have the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
