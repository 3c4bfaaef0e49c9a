"""``python -m tvm_sepconv.demo``."""

import sys

from tvm_sepconv.demo.run import main

sys.exit(main())
