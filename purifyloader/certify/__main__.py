"""`accelerate launch -m purifyloader.certify`: the command, in each of a launcher's processes."""

from __future__ import annotations

import sys

from purifyloader.commands.certify import main
from purifyloader.errors import PurifyError

if __name__ == "__main__":
    try:
        sys.exit(main())
    except PurifyError as error:
        print(f"purifyloader: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("purifyloader: interrupted", file=sys.stderr)
        sys.exit(130)
