"""The kinds of pipeline: what each draws from."""
