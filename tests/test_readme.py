"""The README says what is true: its table is the one the cards give, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_methods_is_that_of_the_cards() -> None:
    table = subprocess.run([sys.executable, "-m", "wellread", "list", "--markdown"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"<!-- wellread list --markdown -->\n(.*?)<!-- end -->", README, re.S)
    assert found and found[1].strip() == table.strip(), "run `make table` and put its output into README.md"


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_methods_it_calls_exist() -> None:
    import wellread

    for chapter, name in re.findall(r"wellread\.(\w+)\.(\w+)\(", README):
        assert callable(getattr(getattr(wellread, chapter), name))
