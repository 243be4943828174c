"""Counts the rooms of lcq, the arrows between them, and the floors they lie on: python docs/rooms.py [PACKAGE]

A room is what lies directly in the package, folder or file. An arrow is a pair of rooms of which the first imports the
second. A room that imports no other lies on floor 1, every other one floor above the highest that it imports.
"""

import sys

import grimp


def arrows(package: str) -> dict[str, set[str]]:
    """The rooms that each room imports."""
    graph = grimp.build_graph(package)
    rooms = graph.find_children(package)
    for room in rooms:
        graph.squash_module(room)
    return {room: graph.find_modules_directly_imported_by(room) & rooms - {room} for room in rooms}


def floors(imported: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room; imports that go round in a circle have none, and are an error."""
    found: dict[str, int] = {}
    while len(found) < len(imported):
        ready = [room for room in imported if room not in found and imported[room] <= found.keys()]
        if not ready:
            raise ValueError(
                f"expected imports without circles, got one among {sorted(imported.keys() - found.keys())}"
            )
        found |= {room: 1 + max((found[other] for other in imported[room]), default=0) for room in ready}
    return found


def main(package: str) -> None:
    imported = arrows(package)
    levels = floors(imported)
    for level in sorted(set(levels.values()), reverse=True):
        print(f"{level:3}  " + ", ".join(sorted(room.split(".")[1] for room in levels if levels[room] == level)))
    print(f"{len(imported)} rooms, {sum(map(len, imported.values()))} arrows, {max(levels.values())} floors")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "lcq")
