#!/usr/bin/env bash
# General capabilities of a model and of its personas, by lighteval, and what a persona costs of them.
#
#   lighteval/run.sh llama-3.1-8b-it                                   # the model alone
#   lighteval/run.sh llama-3.1-8b-it humor loving --method merged      # and two personas
#   lighteval/run.sh llama-3.1-8b-it humor --method theirs --adapter org/name
#   lighteval/run.sh --help
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# lighteval takes its tasks in the order of their hashes; this makes it the same in every run.
export PYTHONHASHSEED=0
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec python3 "$ROOT/lighteval/launch.py" "$@"
