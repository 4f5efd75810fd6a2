"""`python thinktuning.py`: the base model, the comparison, ablations, the novelty test."""
