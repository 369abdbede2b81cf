import sys

from purifyloader.commands.main import main

sys.exit(main())
