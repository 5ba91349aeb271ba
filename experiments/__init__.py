"""Experiments on what layers do, outside the wheel; tools/run_fidelity.py and interaction_operator.py run them."""
