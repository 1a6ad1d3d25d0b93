"""The program that all ranks run together."""
