"""What users talk to: the Python API and, on the leader, the HTTP shim."""
