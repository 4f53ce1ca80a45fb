"""Makes the modules of the repository importable from tests/, and gives every test one thread: tensors this small gain nothing
from a second, and on shared cores waiting for it takes most of the time."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses too; before torch is imported
