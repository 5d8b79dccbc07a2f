"""What all pipelines are made of: calls, denoisers, sampling, noise, pictures."""
