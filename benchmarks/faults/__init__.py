"""Faults in a supervised server under load: what is noticed, lost, left and ready again."""
