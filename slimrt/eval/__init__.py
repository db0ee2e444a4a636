"""Quality of pruned runs against the dense run on identical prompts: tasks, metrics, paired evaluation, report."""
