import sys

from purifyloader.cli import main

sys.exit(main())
