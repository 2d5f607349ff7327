"""What the server that forks the commands of tests/forked.py imports beforehand."""

import importlib
import os

from deploy.common import runtime
from tests.forked import LATER, MODULES

os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for a core cost more than such a small model saves
runtime.import_paddle()
for name in (*MODULES, *LATER):
    importlib.import_module(name)
