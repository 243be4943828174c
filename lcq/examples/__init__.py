"""Data and nets for the demo, the notebooks and the benchmarks; nothing in lcq itself depends on them."""
