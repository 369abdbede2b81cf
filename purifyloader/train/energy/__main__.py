"""`accelerate launch -m purifyloader.train.energy`."""

import sys

from purifyloader.commands.train_energy import main
from purifyloader.errors import PurifyError

try:
    sys.exit(main())
except PurifyError as error:
    print(f"purifyloader: error: {error}", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    print("purifyloader: interrupted", file=sys.stderr)
    sys.exit(130)
