"""`accelerate launch -m purifyloader.train.energy`."""

import sys

from purifyloader.errors import PurifyError
from purifyloader.train.energy.command import main

try:
    sys.exit(main())
except PurifyError as error:
    print(f"purifyloader: error: {error}", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    print("purifyloader: interrupted", file=sys.stderr)
    sys.exit(130)
