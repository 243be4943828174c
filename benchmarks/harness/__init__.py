"""What every script uses: records, checkpoints of trainings, files of nets, tables."""
