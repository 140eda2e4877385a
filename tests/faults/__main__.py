"""Run the campaigns on disks in their short form: some errors, kills and power losses at a resume that prunes.

python -m tests.faults
"""

import sys

from tests.faults import errors, kills, power_loss
from tests.faults.calls import under_the_shim

if __name__ == "__main__":
    under_the_shim()
    only = "resume on 1"
    num_bad = errors.run(5, 3, only=only) + kills.run(3, 0, only=only) + power_loss.run(120, 0, only=only)
    sys.exit(bool(num_bad))
