"""The benchmarks' own modules, and this folder's, can be imported as their scripts import them."""

import sys
from pathlib import Path

from character.constants import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]
