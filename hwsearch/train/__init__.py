"""Fitting weights: tasks, data in memory, a loop that resumes bit for bit, batch-norm statistics."""
