"""``python -m tvm_sepconv.bench``."""

import sys

from tvm_sepconv.bench.run import main

sys.exit(main())
