"""The program `lighteval`, less its tinyBenchmarks tasks: their import downloads a pickle, and fails without a network.

python lighteval/start.py accelerate model_name=org/name lighteval/tasks.txt
"""

import sys
import types

if __name__ == "__main__":
    sys.modules["lighteval.tasks.tasks.tiny_benchmarks"] = types.ModuleType("tiny_benchmarks")
    from lighteval.__main__ import app

    app()
