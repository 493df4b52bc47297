"""`python -m bitsandbytes` tells what is installed; with halfbyte that is `halfbyte doctor`."""

import sys

from halfbyte.cli.main import main

sys.exit(main(["doctor", *sys.argv[1:]]))
