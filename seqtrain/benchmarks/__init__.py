"""Operators, the collective and whole training steps, timed against others in turns, in one run."""
