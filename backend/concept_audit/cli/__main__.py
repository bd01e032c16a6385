"""``python -m concept_audit.cli``."""

import sys

from concept_audit.cli.main import main

sys.exit(main())
