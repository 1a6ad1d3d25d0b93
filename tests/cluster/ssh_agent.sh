#!/usr/bin/env bash
# Stands in for ssh between the hosts of a test; TEST_PYTHON names a Python.
exec "$TEST_PYTHON" -IS "$(dirname "${BASH_SOURCE[0]}")/host.py" ssh "$@"
