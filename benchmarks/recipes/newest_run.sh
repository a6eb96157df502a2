#!/usr/bin/env bash
# Prints the id of the newest run, which other commands take as RUN.
set -euo pipefail
python -m lbllm runs list --json | python -c 'import json, sys; print(json.load(sys.stdin)["runs"][-1]["id"])'
