"""python -m wellread, also under `accelerate launch -m wellread run ...`."""

import sys

from wellread.cli import main

sys.exit(main())
