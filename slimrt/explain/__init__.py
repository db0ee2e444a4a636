"""See what a pruned prefill kept: every block of a prompt and how far it came, time and memory by layer."""
