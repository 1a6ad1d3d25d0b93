#!/usr/bin/env bash
# Stands in for ssh between the hosts of a test; TEST_HOSTS names their folder and a Python.
exec "${TEST_HOSTS#*:}" -IS "$(dirname "${BASH_SOURCE[0]}")/host.py" ssh "${TEST_HOSTS%%:*}" "$@"
