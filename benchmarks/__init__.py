"""Every figure of the README and the docs: scripts, and their results as JSON. See benchmarks/README.md."""
