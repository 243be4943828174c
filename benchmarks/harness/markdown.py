"""Tables as markdown."""


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"
