"""How right: accuracy, error and bytes."""
