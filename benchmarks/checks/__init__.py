"""Whether something holds: exactness, trust in files, committed nets."""
