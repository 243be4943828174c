"""What every script uses: records, checkpoints, tables, files of nets."""
