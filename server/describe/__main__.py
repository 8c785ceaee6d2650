"""`python -m server.describe FOLDER` writes the documents."""

import sys
from pathlib import Path

from server.describe import DOCUMENTS


def main() -> None:
    """Write all documents."""
    folder = Path(sys.argv[1])
    for name, document in DOCUMENTS.items():
        (folder / name).write_text(document())
        sys.stdout.write(f"wrote {folder / name}\n")


if __name__ == "__main__":
    main()
