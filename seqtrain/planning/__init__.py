"""What a model and a run will take, before they are paid for: counts, predicted time and memory, simulated scaling."""
