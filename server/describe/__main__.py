"""`python -m server.describe FOLDER`: write the descriptions there."""

import sys
from pathlib import Path

from server.describe import files


def main() -> None:
    """Write all files."""
    folder = Path(sys.argv[1])
    for name, content in files().items():
        (folder / name).write_text(content)
        sys.stdout.write(f"wrote {folder / name}\n")


if __name__ == "__main__":
    main()
