"""Runs, wherever they lie: folders of checkpoints, and traces whose steps are executed again."""
